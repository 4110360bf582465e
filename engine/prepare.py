"""Fill the cache: every volume of a table, in parallel, each once.

    threads     before training: a table of some hundred cases, most of them there; the first bad file ends it
    processes   scripts/prepare_data.py: any number of cases; every bad file is reported, none stops the others

What is there is skipped, so a run that was stopped goes on where it was; entries appear whole or not at all
(:mod:`data.cache`), so processes and machines may share a cache, or fill one each and have the folders merged.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import psutil
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from config.errors import InputError
from data.cache import VolumeCache
from data.tables.caption_table import CaptionRow
from engine.cli import force_utf8

PREPARING_THREADS = 4  # at most, in a process that goes on to train
WORKER_BYTES = 2 * 2**30  # a volume of 512 x 512 x 300 takes 1.3 GB while it is prepared; there are longer ones

Files = tuple[Path, Path | None]  # image, mask


@dataclass(frozen=True)
class Outcome:
    """What became of one case. ``error``: one line, or empty; ``prepared``: False where it was there before."""

    files: Files
    prepared: bool = False
    error: str = ""


def unique_files(rows: Sequence[CaptionRow]) -> list[Files]:
    """Each pair of image and mask once, in an order that every machine agrees on."""
    return sorted({(row.image_path, row.mask_path) for row in rows}, key=str)


def fill_cache(cache: VolumeCache, rows: Sequence[CaptionRow], threads: int | None = None) -> None:
    """Preprocess what is not cached yet, so that a broken file stops the run now and not at midnight.

    Unpacking, resampling and compression release the interpreter lock, so threads are enough; each volume then
    has one thread of the matrix library, which is faster than all threads on every volume in turn.
    """
    files = unique_files(rows)
    threads = threads or min(os.cpu_count() or 1, PREPARING_THREADS)
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(cache.ensure, image, mask) for image, mask in files]
        try:
            bar = tqdm(total=len(files), desc="preparing volumes", unit="case", dynamic_ncols=True, disable=None)
            for job in jobs:
                job.result()
                bar.update()
            bar.close()
        except BaseException:  # Ctrl-C too: what has not begun is left alone
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def default_workers() -> int:
    """As many processes as there are cores, and as fit into the memory that is free."""
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // WORKER_BYTES))


def prepare_all(cache: VolumeCache, files: Sequence[Files], workers: int, *, verify: bool = False) -> Iterator[Outcome]:
    """Yield the outcome of every case as it is done, in whatever order.

    ``workers`` volumes are in memory at once, never more. Closing the iterator, or Ctrl-C, lets those in hand be
    finished and begins no other.

    Raises:
        InputError: a worker was killed from outside, which is what systems do when memory runs out, or the cache
            cannot be written. What was prepared stays.
    """
    waiting = iter(files)
    context = multiprocessing.get_context("spawn")  # as on Windows, and a fork would copy the parent's threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        running = set()
        try:
            for pair in waiting:
                running.add(pool.submit(_prepare_one, cache, pair, verify))
                if len(running) >= 2 * workers:  # one in hand and one ready for each
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (job.result() for job in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (job.result() for job in done)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker was killed, most likely because memory ran out; what was prepared stays: run the same "
                f"command with fewer --workers than {workers}"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare_one(cache: VolumeCache, files: Files, verify: bool) -> Outcome:
    try:
        return Outcome(files, prepared=cache.ensure(*files, verify=verify))
    except InputError as error:
        return Outcome(files, error=" ".join(str(error).split()))
    except MemoryError:
        return Outcome(files, error=f"{files[0]}: not enough memory to prepare it; use fewer --workers")
    except OSError as error:  # the readers report theirs as InputError
        raise InputError(f"cannot write the cache {cache.root}: {error}; mend that and run the same command") from error


def _begin_worker() -> None:
    """Ctrl-C is the parent's to handle, and a parent that is killed takes its workers along.

    A worker waits for its next case on a pipe that it holds both ends of: without the watch it would wait forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    force_utf8()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    threadpool_limits(1)
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
