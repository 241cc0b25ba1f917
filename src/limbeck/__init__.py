"""Limbeck distils large language models into something cheaper to run.

Importing the package is light.  The first time transformers looks up a saved student (``AutoConfig``,
``AutoModelForCausalLM``) it needs the ``limbeck`` model type, so when transformers is installed the import below arranges
that registration lazily: nothing heavy is loaded until transformers itself is.
"""

__version__ = "0.1.0"

from limbeck._registration import install as _install

_install()
