"""`python -m training.run_clm` with FSDP2 in processes on CPUs, where accelerate by itself shards nothing.

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        -m benchmarks.sharded --use_cpu --fsdp true --fsdp_config '{"transformer_layer_cls_to_wrap": ["GPT2Block"]}' …

Accelerate takes FSDP for accelerators alone; told that these processes have some, it shards on what they have.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from training import run_clm


def shard_on_cpus() -> None:
    """From now on, let this process shard as on GPUs."""
    made = AcceleratorState.__init__

    def make(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        made(self, *args, **kwargs)

    AcceleratorState.__init__ = make


def main(argv: list[str] | None = None) -> None:
    shard_on_cpus()
    run_clm.main(argv)


if __name__ == "__main__":
    main()
