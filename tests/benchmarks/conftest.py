from tests.bench.conftest import cpu, report, run

__all__ = ["cpu", "report", "run"]
