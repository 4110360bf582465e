"""Fill the cache: every volume of the tables, in parallel, each once.

    threads     before training: some hundred cases, most of them cached; the first bad file stops the run
    processes   scripts/prepare_data.py: any number of cases; every bad file is reported, none stops the others

Cached volumes are skipped, so a stopped run continues where it was. Entries are written atomically
(:mod:`data.cache`), so processes and machines may share a cache, or fill one each, to be merged by copying.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from config.errors import InputError
from config.schema import Config
from data.cache import CaseCache, VolumeCache
from data.imaging.reader import read_header
from data.tables.caption_table import NAMED_BY, CaptionRow, scan_caption_table
from engine.cli import force_utf8
from engine.guards import require_room
from engine.interrupt import WorkerContext, leave_signals_to_parent

PREPARING_THREADS = 4  # at most, in a process that goes on to train
STORED_BYTES = 4 / 1.5  # of a preprocessed voxel, compressed
WORKER_BYTES = 2 * 2**30  # of a worker; a volume of 512 x 512 x 300 takes 1.3 GB, and there are longer ones

Files = tuple[Path, Path | None]  # image, mask


class Outcome(NamedTuple):
    """The result of one case. ``error``: one line, or empty; ``prepared``: False where it was cached before."""

    files: Files
    prepared: bool = False
    error: str = ""


class Work(NamedTuple):
    """The files to prepare, where each is named (``table, row N``), and how many rows cannot be used at all."""

    files: list[Files]
    named_in: dict[Files, str]
    unusable_rows: int


def read_work(tables: Iterable[Path], config: Config, named_by: str = NAMED_BY) -> Work:
    """Every table read to its end; a row that cannot be used is printed. ``named_by``: the flag or keys of the tables.

    Raises InputError: a table cannot be read at all.
    """
    named_in: dict[Files, str] = {}
    unusable = 0
    for table in tables:
        scan = scan_caption_table(table, config.table_root, config.path_map, named_by)
        for problem in scan.problems:
            if problem.fatal:
                unusable += 1
                print(f"error: {table}, {problem}", flush=True)
        for row in scan.rows:
            named_in.setdefault((row.image_path, row.mask_path), f"{table}, row {row.number}")
    return Work(sorted(named_in, key=str), named_in, unusable)


def unique_files(rows: Sequence[CaptionRow]) -> list[Files]:
    """Each pair of image and mask once, in the same order on every machine."""
    return sorted({(row.image_path, row.mask_path) for row in rows}, key=str)


def fill_cache(cache: VolumeCache, rows: Sequence[CaptionRow], threads: int | None = None) -> None:
    """Preprocess what is not cached yet, so that a broken file stops the run before its first step.

    Unpacking, resampling and compression release the interpreter lock, so threads are enough. One thread of the matrix
    library for each volume is faster than all threads on one volume after the other.
    """
    files = unique_files(rows)
    require_room(cache.root, bytes_needed(cache, files), "the preprocessed volumes")
    with threadpool_limits(1):
        ensure_all(cache, files, threads or preparing_threads(), "preparing volumes")


def preparing_threads() -> int:
    return min(os.cpu_count() or 1, PREPARING_THREADS)


def ensure_all(cache: CaseCache, files: Iterable[Files], threads: int, label: str, *, verify: bool = False) -> int:
    """Make the entry of each case that has none or a damaged one, in ``threads`` threads, with a progress bar; how many
    were made. The first bad file stops all."""
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(cache.ensure, image, mask, verify=verify) for image, mask in files]
        try:
            return sum(job.result() for job in tqdm(jobs, desc=label, unit="case", dynamic_ncols=True, disable=None))
        except BaseException:  # Ctrl-C too: no further case is started
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def bytes_needed(cache: VolumeCache, files: Iterable[Files]) -> int:
    """About what the cases that are not cached yet will take; one that cannot be read is reported later."""
    spacing = np.array(cache.plan.spacing)
    total = 0.0
    for image, mask in files:
        with suppress(InputError):
            if not cache.entry(image, mask).exists():
                header = read_header(image)
                # In-plane axes first; a 2-D plan keeps the spacing between slices.
                zooms = np.sort(header.zooms)[: len(spacing)]
                grown = np.prod(zooms / np.sort(spacing)[: len(zooms)])
                total += np.prod(header.shape, dtype=float) * grown * STORED_BYTES
    return int(total)


def default_workers() -> int:
    """As many processes as there are cores, and as fit into free memory."""
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // WORKER_BYTES))


def prepare_all(cache: VolumeCache, files: Sequence[Files], workers: int, *, verify: bool = False) -> Iterator[Outcome]:
    """Yield the outcome of each case as it is done, in any order.

    At most ``workers`` volumes are in memory at once. Closing the iterator, or Ctrl-C, finishes the current cases and
    starts no other.

    Raises:
        InputError: a worker was killed from outside, usually because memory ran out, or the cache cannot be written.
            Prepared volumes stay.
    """
    # Spawned, as on Windows: a fork would copy the parent's threads.
    with ProcessPoolExecutor(workers, mp_context=WorkerContext(), initializer=_begin_worker) as pool:
        running = set()
        try:
            for pair in files:
                running.add(pool.submit(_prepare_one, cache, pair, verify))
                if len(running) >= 2 * workers:  # one in work and one queued for each
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
        raise InputError(f"cannot write the cache {cache.root}: {error}; fix that and run the same command") from error


def _begin_worker() -> None:
    """The parent handles a stop, and a worker ends when its parent is killed.

    A worker waits for its next case on a pipe of which it holds both ends: without the watch it would wait forever.
    """
    leave_signals_to_parent()
    force_utf8()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    threadpool_limits(1)
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
