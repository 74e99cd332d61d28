"""neurst: continuous, differentiable fields for spatial omics, regularised by NeurTV."""

from importlib.metadata import PackageNotFoundError, distribution

from neurst import datasets, get, imaging, pl, tl
from neurst.core.storage import written_by

__version__ = written_by()
__all__ = ["datasets", "get", "imaging", "pl", "tl"]


def _refuse_other_package() -> None:
    """Raise an error if the unrelated package `neurst` is installed: its files lie in the same folder as ours."""
    try:
        other = distribution("neurst")
    except PackageNotFoundError:
        return
    msg = (
        f"the package `neurst` {other.version} is installed, another project (speech translation) that owns the same import name as neurst-spatial, so "
        "that their files are mixed: `pip uninstall neurst`, then `pip install --force-reinstall --no-deps neurst-spatial`"
    )
    raise ImportError(msg)


_refuse_other_package()
