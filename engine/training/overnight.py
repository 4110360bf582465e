"""A search over learning rates and batch sizes that survives being killed: what is done, what comes next.

Two records, each with one purpose. The folder of a run says how far the run is: train.py leaves a state file
while it is unfinished, and its result when it is complete. The optuna study says who works on which point of
the grid; several machines may share its storage.

A trial is COMPLETE with a usable checkpoint, PRUNED when the run ended collapsed, FAIL when it failed.
RUNNING trials carry their owner (host, process, start time); a dead owner's trial is taken over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
import psutil
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from config.errors import InputError
from config.schema import Config, keys_with_role
from engine.checkpoint import load_checkpoint

BEST_FILE = "vision_bridge_best_val.pt"  # as train.py names them
FINAL_FILE = "vision_bridge_final.pt"
STATE_FILE = "stage1_state.pt"

# Wide and fixed, so that a later command may add points to the same study.
SPACE = {"lr": FloatDistribution(1e-12, 1e3, log=True), "batch_size": IntDistribution(1, 2**16)}
# A trial without an owner is being claimed right now, or its script died within that moment.
CLAIM_SECONDS = 20.0


@dataclass(frozen=True, order=True)
class Point:
    """One point of the grid."""

    lr: float
    batch_size: int

    @property
    def name(self) -> str:
        return f"lr{self.lr!r}_bs{self.batch_size}"

    def __str__(self) -> str:
        return f"lr {self.lr!r} batch_size {self.batch_size}"


@dataclass(frozen=True)
class Result:
    """How a run ended. ``seconds`` is None for a run that was interrupted in between."""

    state: Literal["finished", "collapsed", "failed"]
    reason: str = ""
    val_loss: float | None = None
    epoch: int | None = None
    token_std: float | None = None
    image_std: float | None = None
    effective_rank: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """One point of the leaderboard. ``state``: of a result, or ``running``, ``interrupted``, ``open``."""

    point: Point
    state: str
    reason: str
    folder: Path
    host: str = ""
    result: Result | None = None


def study_name(config: Config, objective: str, epochs: int, seed: int) -> str:
    """A name that is the same for runs whose losses may be compared, and for no others.

    Files count by their content, so that a table that was edited starts another search, and the same table in
    another place does not.

    Raises:
        InputError: a file that the runs need is missing.
    """
    content: dict[str, Any] = config.to_dict()
    for key in ("num_workers", "memory_cache_mb", "path_map", "image_root", "cache_dir", "output_dir"):
        del content[key]
    for key in keys_with_role("path"):
        if key in content and content[key]:
            content[key] = _digest_of_file(Path(content[key]), key)
    for key in ("caption_csv_train", "caption_csv_val", "nnunet_encoder_checkpoint"):
        config.resolved(key)  # empty: told now, not by every run of the night
    model = Path(config.mamba_model)
    if model.is_dir():
        described = {p.name: p.stat().st_size for p in model.iterdir() if p.is_file()}
        content["mamba_model"] = [described, _digest_of_file(model / "config.json", "mamba_model")]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"{objective}_e{epochs}_s{seed}_{digest}"


def _digest_of_file(path: Path, key: str) -> str:
    if not path.is_file():
        raise InputError(f"file not found: {path}; set {key} in the configuration to a file that exists")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_result(folder: Path) -> Result | None:
    """What a complete run left in its folder; None while the run is not complete."""
    if not (folder / FINAL_FILE).is_file() or (folder / STATE_FILE).exists():
        return None
    alive = (folder / BEST_FILE).is_file()
    try:
        checkpoint = load_checkpoint(folder / (BEST_FILE if alive else FINAL_FILE))
    except InputError as error:
        return Result("failed", str(error))
    numbers = {key: checkpoint.diagnostics.get(key) for key in ("token_std", "image_std", "effective_rank")}
    result = Result("finished", "", checkpoint.val_loss, checkpoint.epoch, **numbers)
    if not alive:
        return replace(result, state="collapsed", reason="every epoch collapsed; this is its last one")
    if checkpoint.collapsed:
        return replace(result, state="collapsed", reason=f"{BEST_FILE} is stamped as collapsed")
    if not math.isfinite(checkpoint.val_loss):
        return replace(result, state="failed", reason=f"val_loss is {checkpoint.val_loss}", val_loss=None)
    if checkpoint.epoch == 0:
        return replace(result, reason="epoch 0 is the untrained bridge: no trained epoch was better and alive")
    return result


def open_storage(storage: str) -> BaseStorage:
    """``storage``: a database URL, or the path of an optuna journal file (for a network folder).

    Raises:
        InputError: it cannot be opened.
    """
    if "://" not in storage:
        path = Path(storage).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    # Two scripts on one SQLite file wait for each other instead of failing.
    options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else None
    try:
        return RDBStorage(storage, engine_kwargs=options)
    except (SQLAlchemyError, ImportError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--storage {storage} cannot be opened ({reason}); expected a URL such as sqlite:///night.db, "
            "or the path of a journal file"
        ) from error


class _Grid(optuna.samplers.GridSampler):
    """The grid in an ask-and-tell loop: there is no optimize() for the sampler to stop."""

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        pass


class Search:
    """The study of one grid on this machine; ``folder`` is where its runs lie."""

    def __init__(
        self, storage: BaseStorage, name: str, lrs: Sequence[float], batch_sizes: Sequence[int], folder: Path
    ) -> None:
        self.folder = folder
        self.points = [Point(lr, size) for lr in dict.fromkeys(lrs) for size in dict.fromkeys(batch_sizes)]
        self.grid = _Grid({"lr": list(dict.fromkeys(lrs)), "batch_size": list(dict.fromkeys(batch_sizes))}, seed=0)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(study_name=name, storage=storage, sampler=self.grid, load_if_exists=True)
        self.host = socket.gethostname()
        self.owner = {"host": self.host, "pid": os.getpid(), "started": psutil.Process().create_time()}

    def folder_of(self, point: Point) -> Path:
        return self.folder / point.name

    def claim(self, given_up: Collection[Point] = (), reclaim: Collection[str] = ()) -> Trial | None:
        """The next run, now ours: one of a dead script, else a new point, else one that failed before.

        Args:
            given_up: points that failed and are not tried again by this script.
            reclaim: hosts whose runs are taken over as if their scripts were dead.
        """
        while True:
            abandoned = self._abandoned(reclaim)
            if abandoned is not None:
                return abandoned
            trials = self._trials()
            known = {_point(trial) for trial in trials}
            settled = {_point(trial) for trial in trials if trial.state != TrialState.FAIL} | set(given_up)
            new = [point for point in self.points if point not in known]
            again = [point for point in self.points if point in known and point not in settled]
            if new and not self.grid.is_exhausted(self.study):
                trial = self._own(self.study.ask(SPACE))
            elif new or again:
                trial = self._add((new or again)[0])
            else:
                return None
            if not self._is_duplicate(trial):
                return trial

    def finish(self, trial: Trial, result: Result) -> None:
        trial.set_user_attr("result", asdict(result))
        if result.state == "finished":
            self.study.tell(trial, result.val_loss)
        else:
            self.study.tell(trial, state=TrialState.PRUNED if result.state == "collapsed" else TrialState.FAIL)

    def rows(self) -> list[Row]:
        """Every point that this study knows or this command asks for: the best first, unfinished ones last."""
        order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL]
        chosen: dict[Point, FrozenTrial] = {}
        for trial in self._trials():
            point = _point(trial)
            if point is None or trial.user_attrs.get("duplicate"):
                continue
            if point not in chosen or order.index(trial.state) <= order.index(chosen[point].state):
                chosen[point] = trial
        rows = [self._row(point, chosen.get(point)) for point in {*self.points, *chosen}]
        states = ["finished", "collapsed", "failed", "running", "interrupted", "open"]

        def rank(row: Row) -> tuple:
            loss, epoch = (row.result.val_loss, row.result.epoch) if row.result else (None, None)
            return states.index(row.state), math.inf if loss is None else loss, epoch == 0, row.point

        return sorted(rows, key=rank)

    def _row(self, point: Point, trial: FrozenTrial | None) -> Row:
        if trial is None:
            return Row(point, "open", "not started yet", self.folder_of(point))
        owner = trial.user_attrs.get("owner", {})
        host, folder = owner.get("host", ""), Path(trial.user_attrs.get("folder", self.folder_of(point)))
        # Ours is not running either: this is asked between runs, or after Ctrl-C.
        if trial.state == TrialState.RUNNING and (owner == self.owner or self._is_dead(owner)):
            return Row(point, "interrupted", "the same command goes on with it", folder, host)
        if trial.state == TrialState.RUNNING:
            return Row(point, "running", f"by process {owner.get('pid')} on {host}", folder, host)
        result = Result(**trial.user_attrs.get("result", {"state": "failed", "reason": "no result was recorded"}))
        return Row(point, result.state, result.reason, folder, host, result)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _own(self, trial: Trial) -> Trial:
        trial.set_user_attr("owner", self.owner)
        trial.set_user_attr("folder", str(self.folder_of(Point(**trial.params))))
        return trial

    def _abandoned(self, reclaim: Collection[str]) -> Trial | None:
        """A RUNNING trial of this grid whose script is dead, taken over as it is: its folder holds its state."""
        for frozen in self._trials():
            if frozen.state != TrialState.RUNNING:
                continue
            owner = frozen.user_attrs.get("owner") or self._owner_of_newcomer(frozen)
            if owner is not None and not (self._is_dead(owner) or owner["host"] in reclaim and owner != self.owner):
                continue
            if "grid_id" not in frozen.system_attrs and not frozen.params:
                # Its script died before the sampler chose a point: there is nothing to take over.
                self.study.tell(frozen.number, state=TrialState.FAIL)
                continue
            trial = Trial(self.study, frozen._trial_id)
            point = Point(trial.suggest_float("lr", 1e-12, 1e3, log=True), trial.suggest_int("batch_size", 1, 2**16))
            if point in self.points:
                return self._own(trial)
        return None

    def _owner_of_newcomer(self, frozen: FrozenTrial) -> dict[str, Any] | None:
        """Wait until whoever claims a trial at this moment has signed it; None if nobody does."""
        age = max(0.0, (datetime.now() - frozen.datetime_start).total_seconds())
        deadline = time.monotonic() + CLAIM_SECONDS - age
        while time.monotonic() < deadline:
            time.sleep(0.2)
            current = next(trial for trial in self._trials() if trial.number == frozen.number)
            if current.state != TrialState.RUNNING or "owner" in current.user_attrs:
                return current.user_attrs.get("owner", self.owner)
        return None

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        """Whether a script of this machine has ended; those of other machines count as alive."""
        if not owner or owner["host"] != self.host:
            return False
        try:
            # The number alone may have gone to another program; the clock's correction is allowed for.
            return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 2
        except psutil.NoSuchProcess:
            return True

    def _add(self, point: Point) -> Trial:
        """A trial at a point of our choosing, owned from its first moment."""
        attributes = {"owner": self.owner, "folder": str(self.folder_of(point)), "token": os.urandom(8).hex()}
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=asdict(point),
                distributions=SPACE,
                user_attrs=attributes,
                system_attrs={"fixed_params": asdict(point)},  # or the sampler would give it another point's number
            )  # fmt: skip
        )
        frozen = next(t for t in self._trials() if t.user_attrs.get("token") == attributes["token"])
        return Trial(self.study, frozen._trial_id)

    def _is_duplicate(self, trial: Trial) -> bool:
        """Two scripts may draw a point at the same time, or another grid may have had it: the first keeps it."""
        point = Point(**trial.params)
        for other in self._trials():
            if other.number < trial.number and other.state != TrialState.FAIL and _point(other) == point:
                trial.set_user_attr("duplicate", True)
                self.study.tell(trial, state=TrialState.FAIL)
                return True
        return False


def _point(trial: FrozenTrial) -> Point | None:
    return Point(**trial.params) if set(trial.params) == set(SPACE) else None
