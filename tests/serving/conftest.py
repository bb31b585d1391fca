from tests.models.transnormer.conftest import model  # noqa: F401 (a fixture)
