"""Runs what Triton compiles for a GPU, without one: PTX for sm_80 and sm_90, in bfloat16 too, which Triton's
interpreter does not see. `card` puts it in the place of Triton's driver, so that launchers run unchanged.

A program runs after the other, all its threads in step. Beside the results of a kernel, this finds

- accesses of global memory outside of the storages of the launch's tensors, or misaligned;
- reads of shared memory that nobody has written, and accesses of one place by two warps with no barrier
  between them, where one writes;
- results of asynchronous instructions (cp.async, TMA, wgmma) that are used before they are waited for:
  they arrive as late as the architecture allows, and what they read is read when they are issued and again
  when they end;
- barriers that not all threads reach, and mbarriers that would be waited for for ever.

It does not find races within a warp, between programs, or that a barrier of some of the threads is meant to
order; nor what ptxas makes of the PTX. Approximate instructions (ex2, rsqrt, division) give the nearest
float32. sm_100's tensor memory is not modelled.
"""
