"""A process that loads a model, generates one token and tells when: `python -m cupaged.benchmark.first_token OPTIONS`.

OPTIONS: LLM's arguments as a JSON object. It prints a JSON object: moments, in seconds on time.monotonic()'s clock,
which on Linux all processes share, and where it ran.
"""

import time

STARTED = time.monotonic()

import json  # noqa: E402 (the clock starts before the imports)
import sys  # noqa: E402

from cupaged import LLM, SamplingParams  # noqa: E402
from cupaged.errors import CupagedError  # noqa: E402

PROMPT = list(range(10, 26))


def main() -> None:
    options = json.loads(sys.argv[1])
    imported = time.monotonic()
    try:
        with LLM(**options) as llm:
            loaded = time.monotonic()
            llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False))
            first_token = time.monotonic()

            from cupaged.benchmark.environment import environment, memory

            backend = llm.engine.backend
            where = {"backend": backend.name, "environment": environment(backend), "memory": memory(backend)}
    except (CupagedError, ValueError) as error:
        sys.exit(str(error))
    moments = {"started": STARTED, "imported": imported, "loaded": loaded, "first_token": first_token}
    print(json.dumps({"moments": moments, **where}))


if __name__ == "__main__":
    main()
