"""Runs what Triton compiles for a GPU, without one: PTX for sm_80, sm_90 and sm_100, which Triton's
interpreter does not see. `card` puts it in the place of Triton's driver, so that launchers run unchanged.

A program runs after the other, all its threads in step; where its warpgroups divide registers among them,
since they do different work, those of each warpgroup. Beside the results of a kernel, this finds

- accesses of global memory outside of the storages of the launch's tensors, or misaligned;
- reads of shared memory that nobody has written, and accesses of one place by two warps with no barrier
  between them, where one writes;
- reads by asynchronous instructions of what threads have written, with no fence between;
- results of asynchronous instructions (cp.async, TMA, wgmma, tcgen05) that are used before they are waited
  for, as they arrive as late as the architecture allows; and writes to what they still read;
- barriers that not all threads reach, and what would be waited for for ever: barriers, mbarriers, registers.

It does not find races within a warp or between programs; nor what ptxas makes of the PTX. Approximate
instructions (ex2, rsqrt, division) give the nearest float32.
"""
