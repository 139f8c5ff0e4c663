"""The local servers; they run on the packages of the extra `serve`."""

from importlib.util import find_spec

from featureflow.errors import UserError

if _missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
    raise UserError(
        "the local servers need " + " and ".join(_missing), fix="pip install 'featureflow[serve]'"
    )
