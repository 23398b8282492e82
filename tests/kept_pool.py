"""One process that tokenizes for all tests of a pytest worker: each new one would import transformers for a second."""

import concurrent.futures
import functools
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool

from kto_jax.data import workers
from kto_jax.data.tokens.encoded_rows import start_encoder
from kto_jax.data.tokens.tokenizer import quieten_transformers

_TOKENIZES = (start_encoder, quieten_transformers)


def open_pool(num_workers, context, *, initializer, initargs):
    """Stands in for ProcessPoolExecutor in kto_jax.data.workers."""
    start, arguments = initargs
    if num_workers == 1 and start in _TOKENIZES:
        return _KeptPool(start, arguments)
    return concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer, initargs)


class _KeptPool:
    """Hands work to the kept process, which it first makes start as a new one would, in this folder and environment."""

    begun = None
    """The pool whose start the process ran last: others that are open meanwhile must start it again."""

    def __init__(self, start, arguments):
        self._begin = functools.partial(_begin, os.getcwd(), dict(os.environ), start, *arguments)

    def submit(self, function, *args):
        if _KeptPool.begun is not self:
            _KeptPool.begun = self
            try:
                _process().submit(self._begin)
            except BrokenProcessPool:
                _process.cache_clear()
                _process().submit(self._begin)
        return _process().submit(function, *args)

    def shutdown(self, wait, cancel_futures):
        """Keeps the process."""


@functools.cache
def _process():
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer=workers._start, initargs=(None, ()))


def process_ids():
    """Of the kept process, if it was started: tests of other child processes leave it out."""
    return {str(pid) for pid in _process()._processes or ()} if _process.cache_info().currsize else set()


def _begin(folder, environment, start, *arguments):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    workers._make_start((start, arguments))
