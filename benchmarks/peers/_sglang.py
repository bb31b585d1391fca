"""Single files of SGLang's wheel."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

FOLDERS = ("kernels/ops/attention/linear", "srt/layers/attention/linear")  # of newer versions and of older ones


def sglang(file: str) -> ModuleType:
    """The file as a module, without importing the package: that wants dozens of packages that one kernel does not.

    Raises:
        ModuleNotFoundError: SGLang is not installed, or has no such file.
    """
    spec = find_spec("sglang")
    places = [] if spec is None else [Path(x) for x in spec.submodule_search_locations or ()]
    for path in (place / folder / file for place in places for folder in FOLDERS):
        if not path.exists():
            continue
        name = f"_sglang_{path.stem}"
        if name not in sys.modules:
            found = spec_from_file_location(name, path)
            assert found is not None
            assert found.loader is not None
            sys.modules[name] = module = module_from_spec(found)
            try:
                found.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
    raise ModuleNotFoundError(f"sglang is not installed, or has no {FOLDERS[0]}/{file}")
