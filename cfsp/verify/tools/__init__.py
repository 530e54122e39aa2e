"""One script for each tool: it loads a model with that tool alone and says what it computes of given tokens.

Scripts, not modules of the package: each runs in a process of its own, with the Python that has its tool, and refuses
to import cfsp. ``argv[1]`` is the request, the last line of stdout the answer, both JSON:

    {"path": folder, "file": GGUF file, "token_ids": [[int]], "greedy": n, "dtype": "float32",
     "trust_remote_code": false}
    {"version": ..., "logprobs": [[float]] of tokens 1..T-1, "greedy": [[int]] n tokens after each window, ...}
"""
