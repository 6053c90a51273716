"""The application: fronts that take requests, replicas that answer them."""

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application

from ...base.errors import InvalidArgument
from ..openai.auth import read_keys
from .front import Front
from .options import Options
from .replica import Replica
from .scaling import by_sequences

SPINS = "1000"  # of OpenMP's threads that wait, as of `hf-paged serve`: the event loop needs the cores, too
FRONT_CPUS = 0  # as of Ray's own proxies: it passes on what others have computed
MOST_AT_FRONT = 10_000  # requests under way in one front; the replicas' own limits come first


def build_app(model: str | None = None, **options) -> Application:
    """An application for `serve.run`: replicas of a model behind an OpenAI-compatible address.

        from ray import serve
        from hf_paged.integrations.ray_serve import build_app
        serve.run(build_app("HuggingFaceTB/SmolLM2-135M-Instruct", num_replicas=2, num_gpus=1))

    Args:
        model: hub id, or a folder that every node has; None: the embedded default.
        options: see Options.

    Raises ValueError (pydantic's, or InvalidArgument) for what is wrong with them.
    """
    return _application(Options(model=model, **options))


def app(options: Options) -> Application:
    """The same for `serve run hf_paged.integrations.ray_serve:app model=... num_replicas=2`, and as `import_path` in config files."""
    return _application(options)


def _application(options: Options) -> Application:
    config = options.engine_config()
    keys = read_keys(list(options.server.get("api_keys", ())), None)
    settings = options.settings(api_keys=keys)
    replicas = serve.deployment(**_replicas(options, config))(Replica).bind(options, keys)
    may_be_none = options.autoscaling is not None and options.autoscaling.get("min_replicas") == 0
    fronts = serve.deployment(
        name="Front",
        num_replicas=options.num_fronts,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        max_ongoing_requests=MOST_AT_FRONT,
        graceful_shutdown_timeout_s=options.grace,
    )
    return fronts(serve.ingress()(Front)).bind(replicas, settings, may_be_none)


def _replicas(options: Options, config) -> dict:
    """Of the deployment of engines."""
    variables = {"env_vars": {"GOMP_SPINCOUNT": SPINS}}
    amounts = {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus}
    made = {
        "name": "Replica",
        "ray_actor_options": amounts | {"runtime_env": variables},
        "user_config": {"adapters": options.adapters},
        "max_ongoing_requests": options.max_ongoing_requests or 2 * config.max_num_seqs,
        "max_queued_requests": config.max_queue or -1,
        "graceful_shutdown_timeout_s": options.grace,
        "health_check_period_s": options.health_check_period,
        "request_router_config": RequestRouterConfig(
            request_router_class="hf_paged.integrations.ray_serve.router.PrefixRouter",
            request_router_kwargs={"slack": options.load_slack if options.prefix_routing else None},
        ),
    }
    if options.tensor_parallel_size > 1:
        bundle = {"CPU": options.num_cpus, "GPU": options.num_gpus}
        made["placement_group_bundles"] = [bundle] * options.tensor_parallel_size
        made["placement_group_strategy"] = options.placement_strategy
    return made | _number(options, config)


def _number(options: Options, config) -> dict:
    if options.autoscaling is None:
        return {"num_replicas": options.num_replicas}
    if options.num_replicas != 1:
        raise InvalidArgument("num_replicas: autoscaling decides how many there are; name min_replicas and max_replicas there")
    fields = {"target_ongoing_requests": config.max_num_seqs, "policy": {"policy_function": by_sequences}}
    return {"autoscaling_config": AutoscalingConfig(**fields | options.autoscaling)}
