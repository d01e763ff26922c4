"""The learner of a run with several: rank 0 of the group, and the same long Dask task that a single learner is.

If a rank is lost, the incarnation ends. The next one, in the same task, resumes with the ranks that there are.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from dask.typing import Key
from distributed import Client, Worker, get_client, get_worker

from dask_isgd.core.spec import RunSpec
from dask_isgd.errors import ConfigError, NonFiniteLossError, WorkersLostError
from dask_isgd.learner.gradient_sum import GroupLostError
from dask_isgd.learner.group.follower import open_share
from dask_isgd.learner.group.leader import Experience, Leader
from dask_isgd.learner.group.rank import Rank
from dask_isgd.learner.group.roles import Measured
from dask_isgd.learner.group.shared_draws import SharedDraws
from dask_isgd.learner.group.stepper import GroupStepper
from dask_isgd.learner.shares import Shares
from dask_isgd.learner.task import Learner
from dask_isgd.learner.threads import learner_threads
from dask_isgd.runtime.allocator import keep_freed_memory
from dask_isgd.runtime.dask_internals import calm, memory_limit, unmetered
from dask_isgd.runtime.long_task import Parts, rescheduled
from dask_isgd.runtime.torch_threads import LearnerThreads
from dask_isgd.sampling.variance import Variance

logger = logging.getLogger(__name__)

_LOSSES = 3
"""Groups that end without progress in between, after which a run fails."""
_REPORTS = 30
"""Reports after a change of roles until gains are those of the present ones: averages have forgotten the others."""
_FIRST, _LAST, _SHARE = 1.0, 10.0, 0.2
"""Roles are judged after a fifth of the time since the group began, between a second and ten."""


class _RegroupedError(GroupLostError):
    """The group ends because its workers are to have other roles."""


@unmetered
def learn_together(spec: RunSpec) -> dict[str, Any]:
    """Train as ``learn`` does, with ``spec.learning.learners`` ranks.

    Raises NoLearnerWorkerError if there are not so many places, WorkersLostError if ranks are lost again and again.
    """
    worker, client = get_worker(), get_client()
    keep_freed_memory(memory_limit())
    calm(worker)
    experience, losses = Experience(), 0
    with learner_threads(spec, worker) as threads:
        while True:
            learner = GroupLearner(spec, worker, client, worker.get_current_task(), threads, experience)
            outcome = learner.run()
            if learner.lost is None:
                return learner.result(rescheduled(outcome))
            losses = 1 if learner.progressed else losses + 1
            if losses > _LOSSES:
                raise WorkersLostError(
                    f"run {spec.name}: {losses} groups of learners ended without progress in between ({learner.lost}). "
                    "Look at the workers' logs, for memory use first; then continue with resume=True"
                )


class GroupLearner(Learner):
    """One incarnation of a group's rank 0."""

    def __init__(
        self,
        spec: RunSpec,
        worker: Worker,
        client: Client,
        key: Key,
        threads: LearnerThreads,
        experience: Experience,
    ) -> None:
        super().__init__(spec, worker, client, key, threads)
        self._experience = experience
        self._leader: Leader | None = None
        self._returns = False
        """Whether an earlier incarnation was of this very start of the run."""
        self.lost: str | None = None
        """Why the next incarnation has other ranks; None if there is none, or in another task."""
        self._judges = spec.scores and not spec.learning.synchronous
        """Whether workers may score that could learn."""
        self._began = self._judged = time.monotonic()
        self._first_step = 0
        self._mark: tuple[int, float, float, float] | None = None
        """Steps, and seconds: of training, of waiting for others, and of this thread's computing, when last judged."""

    @property
    def progressed(self) -> bool:
        """Whether steps were taken since the checkpoint that was resumed from."""
        return self.step > self.checkpointer.step

    def open(self, parts: Parts) -> None:
        self._parts, leases = parts, self.spec.directory.leases("learner")
        highest = leases.highest()
        self._returns = highest > 0 and leases.owner(highest).get("key") == str(self.key)
        super().open(parts)

    def _open_feed(self, parts: Parts) -> None:
        """Wait with it: it has this rank's share, which depends on how many ranks there are."""

    def _open_stepper(self) -> None:
        """Wait with it, too."""

    def work(self) -> str:
        try:
            self._gather()
            return super().work()
        except GroupLostError as error:
            return self._go_on_with_others(error)
        except NonFiniteLossError as error:
            raise error if self._leader is None else self._leader.telling(error) from None

    def _end_steps(self) -> None:
        if hasattr(self, "stepper"):  # otherwise the ranks have not come
            super()._end_steps()

    def _open_alone(self) -> None:
        super()._open_feed(self._parts)
        super()._open_stepper()

    def _gather(self) -> None:
        """Gather the other ranks. Raises NoLearnerWorkerError, or GroupLostError if they do not all come."""
        learning, parts = self.spec.learning, self._parts
        if self.step >= learning.steps:
            self._open_alone()
            return
        if self.trainer.device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"Learning.device: got {self.trainer.device.type}, wanted cpu or cuda: gradients are summed over "
                "several learners on these only"
            )
        leader = Leader(
            self.spec,
            self.worker,
            self.client,
            self.incarnation,
            self._experience,
            elastic=self._returns,
            tick=self._tick,
        )
        leader = self._leader = parts.open(leader)
        self._first_step = self.step
        self._announce_group()
        if leader.count == 1:
            self._open_alone()
            return
        draws = SharedDraws(learning.batch_size, 0, leader.count, self.timeout)
        self.feed = parts.add(open_share(self.spec, draws, draws.share, self.trainer, self.worker))
        parts.add(draws)
        leader.form(self.trainer.device)
        options = {"size": learning.batch_size, "report_every": learning.report_every}
        rank = parts.add(Rank(self.trainer, self.feed, draws, Shares(), **options))
        lookahead = max(rank.agree(self.feed.lookahead))
        rank.synchronise()
        logger.info("run %s: %d learners; feed: %s", self.spec.name, leader.count, self.feed.reason)
        self.stepper = GroupStepper(
            rank,
            self.batch_sampler,
            self.reporter,
            self._report,
            pace=self._pace(),
            report_every=learning.report_every,
            lookahead=lookahead,
            step=self.step,
        )

    def _tick(self) -> None:
        """Give a sign of life while other ranks are waited for. Raises GroupLostError if the run is to end."""
        self._handle_events()
        self._heartbeat()
        if self._must_end:
            raise GroupLostError("the run ends before its learners have come")

    def _take_step(self) -> None:
        super()._take_step()
        if self._leader is None or not self.stepper.at_rest or self.step >= self.spec.learning.steps:
            return
        why = ""
        if self.checkpointer.is_due(self.step) and self._leader.may_grow():
            why = "there are places for more learners"
        elif self._judges and self._judgement_is_due():
            why = self._new_roles(self._leader)
        if why:
            self._end_steps()
            raise _RegroupedError(why)

    def _judgement_is_due(self) -> bool:
        now = time.monotonic()
        due = now - self._judged > min(max(_FIRST, _SHARE * (now - self._began)), _LAST)
        self._judged = now if due else self._judged
        return due

    def _new_roles(self, leader: Leader) -> str:
        """Judge whether workers are to learn or to score; return why they are to change, "" if they are not."""
        self._announce_group()  # again: an event may be lost
        variance = self.batch_sampler.monitor.variance
        seconds, now = self.checkpointer.seconds(), self._measured(variance)
        why = leader.judge(now, at=seconds, ideal_gain=variance.ideal_gain, pays=self.batch_sampler.open)
        self.roles_worth = self._experience.worth
        return why

    def _measured(self, variance: Variance) -> Measured | None:
        """Return what was measured since the latest judgement; None too soon after the group began."""
        now = (self.step, self.checkpointer.seconds(), self.stepper.waited, time.thread_time())
        before, self._mark = self._mark, now
        reports = _REPORTS if self._experience.why else 0
        settled = self.step - self._first_step >= reports * self.spec.learning.report_every
        if before is None or self.step == before[0] or not settled:
            return None
        steps, seconds, waited, computing = (new - old for new, old in zip(now, before, strict=True))
        # threads that send gradients may take the core from this one, which then neither computes nor waits for a sum
        computing = min(computing, seconds - waited) if self.trainer.device.type == "cpu" else seconds - waited
        return Measured(seconds / steps, computing / steps, variance.gain / variance.ideal_gain)

    def _announce_group(self) -> None:
        if self._leader is None:
            return
        self.learners_scoring, self.roles_worth = self._experience.scorers, self._experience.worth
        self.announcer.group(self._leader.addresses, scorers=self._experience.scorers, why=self._experience.why)

    def _pause(self) -> None:
        super()._pause()
        self._mark = None  # a pause is no step

    def _go_on_with_others(self, error: GroupLostError) -> str:
        """Commit, and leave the run to the next incarnation in this task, unless the run is to end."""
        stepper = self.__dict__.get("stepper")
        if isinstance(stepper, GroupStepper):
            self.step = stepper.next_step
        if self._must_end:
            return self.leave()
        why = str(error)
        if isinstance(error, _RegroupedError):
            logger.info("run %s: the learners regroup at step %d: %s", self.spec.name, self.step, why)
        else:
            if self._leader is not None:
                why = f"{why}; workers lost: {self._leader.explain()}"
            logger.warning("run %s: the learners end at step %d: %s", self.spec.name, self.step, why)
            self.announcer.fault("learners", f"step {self.step}: {why}")
        # on another device than a CPU, work may have failed that was queued when a rank was lost
        if isinstance(error, _RegroupedError) or self.trainer.device.type == "cpu":
            self.checkpointer.commit_now(self.step)
        self.lost = why
        return "left"
