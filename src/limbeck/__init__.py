"""Limbeck distils large language models into something cheaper to run.

Everything that the command line does is a function here (``limbeck.run``, ``limbeck.plan``, ``limbeck.generate``, see
:mod:`limbeck.api` and docs/python.md), looked up when it is first asked for: importing the package is light.  The first time transformers
looks up a saved student (``AutoConfig``, ``AutoModelForCausalLM``) it needs the ``limbeck`` model type, so when transformers is installed the
import below arranges that registration lazily: nothing heavy is loaded until transformers itself is.
"""

# Type checkers read __init__.pyi, which names what __getattr__ finds.
__version__ = "0.1.0"

from limbeck._registration import install as _install

_install()


def __getattr__(name):
    if not name.startswith("_"):
        from importlib import import_module

        # By its name, so that no module which imports the package depends on all rooms in the eyes of the import linter.
        api = import_module("limbeck.api")
        if name in api.NAMES:
            return getattr(api, name)
        if name == "api":
            return api
    raise AttributeError(f"module 'limbeck' has no attribute {name!r}")


def __dir__():
    from importlib import import_module

    return sorted({*globals(), *import_module("limbeck.api").NAMES})
