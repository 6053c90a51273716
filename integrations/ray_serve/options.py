"""What is deployed: the arguments of `app`, in Python, on `serve run`'s command line, or in a config file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...base.config import EngineConfig
from ...base.errors import InvalidArgument
from ...base.images import ImageLimits
from ...base.offload import Offload
from ..openai.settings import Limits, Settings

MAX_NUM_SEQS, MAX_QUEUE = 64, 1024  # as of `hf-paged serve`

Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


class Options(BaseModel):
    """
    Attributes:
        model: hub id, or a folder that every node has; None: the embedded default.
        dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's.
        quantization: "int4", "int8" or "fp8": round the linear layers' weights after loading.
        draft_model: hub id or folder of a smaller model that guesses tokens ahead.
        chat_template: one instead of the model's, as text.
        adapters: folders of PEFT adapters by the names that clients call them; every replica loads all of them. The
            deployment's `user_config` can change them while the replicas run.
        engine: fields of EngineConfig; of `images` and `offload`, those of ImageLimits and Offload.
        server: fields of the server's Settings; `api_keys` may also come from HF_PAGED_API_KEYS where the application is built.
        num_replicas: engines, each with a copy of the model.
        autoscaling: fields of Ray Serve's AutoscalingConfig instead, such as `min_replicas` and `max_replicas`;
            `target_ongoing_requests` counts sequences that run or wait in a replica's engine (default: `max_num_seqs`).
        tensor_parallel_size: processes that hold one copy of the model together.
        num_cpus, num_gpus: of each process. On CPU an engine has as many threads as `num_cpus`.
        placement_strategy: how a replica's processes are placed; see Ray's placement groups.
        prefix_routing: send a prompt to the replica that has seen its beginning; else Ray's own choice.
        load_slack: how many more requests than the least loaded that replica may have.
        num_fronts: processes that take requests and pass them to the replicas.
        max_ongoing_requests: requests that a replica takes at a time; others wait for the next that is free. None: twice
            `max_num_seqs`, so that the engine has some to choose from.
        grace: seconds that running requests get when a replica is stopped.
        health_check_period: seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: Literal["int4", "int8", "fp8"] | None = None
    draft_model: str | None = None
    chat_template: str | None = None
    adapters: dict[str, str] = {}
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    num_replicas: Positive = 1
    autoscaling: dict[str, Any] | None = None
    tensor_parallel_size: Positive = 1
    num_cpus: Amount = 1
    num_gpus: Amount = 0
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    prefix_routing: bool = True
    load_slack: Annotated[int, Field(ge=0)] = 4
    num_fronts: Positive = 1
    max_ongoing_requests: Positive | None = None
    grace: Amount = 30.0
    health_check_period: Annotated[float, Field(gt=0)] = 5.0

    def engine_config(self) -> EngineConfig:
        fields = {"max_num_seqs": MAX_NUM_SEQS, "max_queue": MAX_QUEUE} | self.engine
        for name, kind in (("images", ImageLimits), ("offload", Offload)):
            if isinstance(fields.get(name), dict):  # from a config file
                fields[name] = kind(**fields[name])
        return EngineConfig(**fields)

    def settings(self, **more) -> Settings:
        """Raises InvalidArgument for what would not hold for all replicas."""
        fields = self.server | more
        if fields.get("enable_adapters"):
            raise InvalidArgument(
                "server.enable_adapters: a request would reach one replica only; name `adapters`, which all replicas load, "
                "and change them by the deployment's user_config"
            )
        fields |= {name: tuple(fields[name]) for name in ("api_keys", "cors_origins", "allowed_media_hosts") if name in fields}
        if isinstance(fields.get("limits"), dict):
            fields["limits"] = Limits(**fields["limits"])
        return Settings(**fields)
