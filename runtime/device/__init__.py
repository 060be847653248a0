"""Dispatch on the device: a whole step is recorded once, and replayed without the host.

The host's part of a call is to copy the inputs, to start the recording, and to read what was decided when it has come.
Everything else is in the recording: the routers, Algorithm 1 (`decide.cu`), and for each row of each block
a switch whose bodies are the reuse of a residual and the block at each of its widths.

    step.py       the recording of one forward: its buffers, its guards
    policy.py     a policy as numbers that the recording reads, so that another one needs no new recording
    requests.py   whose residuals: the clock of a request, the contexts that share it
    reader.py     what was decided, back on the host
    runner.py     a call of a compiled transformer, from these
    recorder.py   what a recorder does; cuda_graph.py: the one for CUDA; kernels.py: decide.cu compiled
"""
