"""Scripts of the tools. Each loads a model with its tool alone and prints log-probabilities of given tokens.

They are scripts and not modules of the package. Each runs in a process of its own, with the Python that has its tool,
and refuses to import cfsp. ``argv[1]`` is the request, and the last line of stdout is the answer; both are JSON:

    {"path": folder, "file": GGUF file, "token_ids": [[int]], "greedy": n, "dtype": "float32",
     "trust_remote_code": false}
    {"version": ..., "logprobs": [[float]] of tokens 1..T-1, "greedy": [[int]] n tokens after each window, ...}
"""
