"""What a plan costs, before anything runs: fill, use of the budgets, balance, waiting of ranks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from vlm.data.pack import fewest
from vlm.data.plan import Plan, Position

DUMMY_PATCHES = 4
"""A micro-batch without an image runs the tower on so many, and counts one token if it is empty."""


@dataclass(frozen=True)
class PlanReport:
    """Shares are in 0..1, over all steps looked at."""

    samples: int
    """Of an epoch; so are the next."""
    steps: int
    steps_seen: int
    """Steps that the figures below are from."""
    micro_batches: float
    """Per step and rank."""
    fewest_micro_batches: float
    """The same where budgets could be filled to the brim: no plan has less."""
    samples_per_micro_batch: float
    skipped: float
    """Share of samples that are left out, since they train nothing."""
    fill: float
    """Real tokens and patches among those that are computed; the rest is dummies, and padding where
    there is any."""
    token_use: float
    patch_use: float
    """Of the budgets."""
    balance: float
    """FLOPs of the mean rank / of the slowest, where ranks meet once a step."""
    waiting: float
    """Share of time that the mean rank waits, where ranks meet in every micro-batch and time
    goes by FLOPs."""

    def line(self) -> str:
        """For the banner."""
        skipped = ""
        if self.skipped:
            skipped = (
                f"; {self.skipped:.1%} of the samples left out, which have no image while the "
                "language model is frozen"
            )
        return (
            f"plan: {self.steps:,} steps an epoch of {self.samples:,} samples; a step has "
            f"{self.micro_batches:.2f} micro-batches a rank (of at "
            f"least {self.fewest_micro_batches:.2f}) of {self.samples_per_micro_batch:.1f} "
            f"samples; fill {self.fill:.2%}, tokens {self.token_use:.1%} and patches "
            f"{self.patch_use:.1%} of their budgets; ranks' balance {self.balance:.2%}, waiting "
            f"{self.waiting:.2%}{skipped}"
        )

    def table(self) -> str:
        """One figure a line."""
        rows = asdict(self).items()
        return "\n".join(f"{name:24}{value:>14,.6g}" for name, value in rows)


def report(plan: Plan, most_steps: int | None = None, epoch: int = 0) -> PlanReport:
    """The figures of an epoch; of `most_steps` of its steps, evenly spread, where given."""
    steps = plan.steps_per_epoch
    seen = min(steps, most_steps or steps)
    positions = [Position(epoch, step * steps // seen) for step in range(seen)]
    of_epoch = replace(plan, costs=plan.balanced_costs(epoch))
    return summarise(of_epoch, [plan.ranks(position) for position in positions])


def summarise(
    plan: Plan, steps: Sequence[list[list[list[int]]]], padded: bool = False
) -> PlanReport:
    """The figures of some arranged steps: each [rank][micro-batch][sample].

    Args:
        padded: the loop pads the samples of a micro-batch to the longest, as ours never does.
    """
    budget = plan.budget
    limits = np.array([budget.tokens, budget.patches])
    bins = least = kept = tokens = patches = beside = 0
    mean = slowest_rank = slowest_bin = 0.0
    for ranks in steps:
        shape = len(ranks), len(ranks[0])
        sizes = np.array([len(micro) for rank in ranks for micro in rank])
        numbers = np.array([n for rank in ranks for micro in rank for n in micro], np.int64)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        costs = np.bincount(owner, plan.costs[numbers], len(sizes)).reshape(shape)
        images = np.bincount(owner, plan.patches[numbers], len(sizes))
        bins += len(sizes)
        needs = np.stack([plan.lengths[numbers], plan.patches[numbers]], axis=1)
        needs[(needs > limits).any(axis=1)] = limits  # such a sample goes alone
        least += fewest(needs, limits, shape[0])
        kept += len(numbers)
        tokens += int(plan.lengths[numbers].sum())
        patches += int(plan.patches[numbers].sum())
        beside += int((sizes == 0).sum()) + DUMMY_PATCHES * int((images == 0).sum())
        if padded:
            longest = np.zeros(len(sizes), np.int64)
            np.maximum.at(longest, owner, plan.lengths[numbers])
            beside += int((longest * sizes).sum() - plan.lengths[numbers].sum())
        mean += costs.sum() / shape[0]
        slowest_rank += costs.sum(axis=1).max()
        slowest_bin += costs.max(axis=0).sum()
    total = plan.epoch_samples
    share = len(steps) / plan.steps_per_epoch
    return PlanReport(
        samples=total,
        steps=plan.steps_per_epoch,
        steps_seen=len(steps),
        micro_batches=bins / len(steps) / plan.world,
        fewest_micro_batches=least / len(steps),
        samples_per_micro_batch=kept / bins,
        skipped=_skipped_share(plan) if share < 1 else 1 - kept / total,
        fill=(tokens + patches) / (tokens + patches + beside),
        token_use=tokens / (bins * budget.tokens),
        patch_use=patches / (bins * budget.patches),
        balance=mean / slowest_rank if slowest_rank else 1.0,
        waiting=1 - mean / slowest_bin if slowest_bin else 0.0,
    )


def _skipped_share(plan: Plan) -> float:
    return float((plan.patches == 0).mean()) if plan.skips_text else 0.0
