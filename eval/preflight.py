"""What can be known to go wrong before the first question is asked."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException

from eval.benchmarks import Benchmark
from eval.options import Options
from eval.result import EvalError

SECONDS = 10


def check_settings(benchmark: Benchmark, options: Options, backend: str) -> None:
    """What needs no server; EvalError in one sentence."""
    if backend not in benchmark.backends:
        have = " and ".join(benchmark.backends)
        raise EvalError(f"{benchmark.name} has no {backend} adapter; there is {have}")
    if benchmark.judge == "required" and options.judge is None:
        raise EvalError(f"{benchmark.name} is scored by a judge; name one with --judge URL,MODEL")
    data = options.data_root
    if data and not data.exists():
        raise EvalError(f"--data_root {data} does not exist")
    if data and data.is_file() and benchmark.hub_id:
        raise EvalError(
            f"--data_root {data} is a file; {benchmark.name} needs the folder of its data"
        )


def check_endpoints(options: Options) -> None:
    """The server and the judge answer, and have their models; EvalError in one sentence."""
    check_endpoint(options.api_base, options.model, options.api_key)
    if options.judge:
        check_endpoint(options.judge.api_base, options.judge.model, options.judge.api_key)


def check_endpoint(api_base: str, model: str, api_key: str) -> None:
    """The endpoint answers and lists the model."""
    try:
        request = urllib.request.Request(f"{api_base}/models")
        request.add_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            listed = [entry["id"] for entry in json.load(answer)["data"]]
    except urllib.error.HTTPError as error:
        raise EvalError(
            f"{api_base} answers {error.code} {error.reason} to a list of models"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EvalError(f"{api_base} cannot be asked ({reason}); is the server running?") from None
    if model not in listed:
        raise EvalError(f"{api_base} has no model {model}; it has {', '.join(listed)}")
