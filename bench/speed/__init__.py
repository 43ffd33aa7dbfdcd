"""How fast dtrain is, and how much memory it takes, beside other tools and beside plainly copying the weights.

    python -m bench.speed                                   # measure what is missing, then draw docs/results/speed.png
    python -m bench.speed --sizes 20M --only write          # some of it
    python -m bench.speed --again                           # all of it anew, on a quiet machine with 16 GB free
    python -m bench.speed --table                           # measure nothing, print the Markdown

The tools beside dtrain are installed into a folder of their own, which only the measuring processes see:

    python -m pip install --no-deps --target runs/peers/speed deltatensors==0.2.0 sparse-llm==0.0.5 zipnn==0.5.4

Two models are made up, with the shapes of an encoder, weights N(0, 0.122) and a delta N(0, 5e-4): in bfloat16, where
rounding leaves 38 % of the elements as they were, and in float32. What is compared takes turns in one process, round by
round, so that whatever else the machine does slows all alike; a ratio is that of one round, and its median is shown.
Memory is measured apart, in a process for each.
"""
