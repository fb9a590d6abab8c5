"""An evicting cache that stays on its device: scoring, budgets of heads, selection and memory."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from simulator.policies.language import Policy
from simulator.policies.wave import Wave
from validate.eviction.device.back_end import DeviceBackEnd
from validate.eviction.device.pool import DevicePool
from validate.eviction.device.schedule import Schedule
from validate.eviction.face import PolicyCache, new_plan
from validate.eviction.kernels.ops import Ops


class DeviceCache(PolicyCache):
    """The cache of one batch under a policy, for policies whose every part the device can carry out.

    It decides as ``EvictingCache`` does, which takes any policy and scores on the host. Between two
    compressions a decode step is the same launches on the same memory, so that a CUDA graph can hold it.

    Parameters
    ----------
    model : PreTrainedModel
    policy : Policy
    entries : int or sequence of int
        Mean budget in entries per KV head, of all sequences or of each.
    ahead : int
        Tokens to be decoded at most; a full cache takes their memory at once.
    prompt_tokens, name, revision, waves, seeds
        As ``EvictingCache``.
    ops : Ops, optional
        The kernels; those of the model's device by default.

    Raises
    ------
    UserError
        For a policy or a model that the device cannot serve.
    NoDeviceError
        When the cache does not fit, or without Triton on a GPU.
    InfeasibleBudgetError, MissingDataError, PolicyError
        As ``EvictingCache``.
    """

    back_end: DeviceBackEnd

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        entries: int | Sequence[int],
        *,
        ahead: int,
        prompt_tokens: int | None = None,
        name: str = "",
        revision: str = "",
        waves: dict[str, Wave] | None = None,
        seeds: Sequence[int] | None = None,
        ops: Ops | None = None,
    ) -> None:
        plan = new_plan(model, policy, entries, name=name, revision=revision, waves=waves, seeds=seeds)
        back_end = DeviceBackEnd(plan, model.device, model.dtype, ahead, ops)
        super().__init__(plan, back_end, prompt_tokens)

    @property
    def pool(self) -> DevicePool:
        """Memory of all layers, laid out when the prompts are read."""
        return self.back_end.pool

    @property
    def schedule(self) -> Schedule:
        """When each layer of each sequence compresses."""
        return self.back_end.schedule

    @property
    def n_compressions(self) -> int:
        """Compressions after the prompts; one for all layers and rows that were due together."""
        return self.back_end.n_compressions
