"""Eviction on a GPU: nothing that a decode step or a compression needs leaves the device.

Memory is one block of slots for all layers. A *segment* is what one KV head of one sequence holds in one
layer: ``lengths[s]`` entries from slot ``starts[s]`` on, by position. Segments of a layer and sequence stand
side by side, KV head by KV head. Everything below takes

keys, values : Tensor (capacity, head_dim), float32, float16 or bfloat16
starts : int64 (n_segments,)
lengths : int32 (n_segments,)
scores : float32 (capacity,), one for each slot that is held; plus infinity where an entry is protected

and answers on the device they are on, without telling the host. ``kernels`` holds the Triton kernels,
``twins`` the same in torch, which is what a CPU runs and what the kernels are tested against, and ``ops``
picks one of both.
"""
