"""What can be proven of a Triton kernel without a GPU; nothing here knows the ops of this library.

accesses   every pointer access of an interpreted kernel with the argument it comes from
traffic    bytes, sectors and matrix-product flops counted from them
bounds     each access falls on an element of its argument
launches   what a launcher would launch, captured on meta tensors: real shapes, no memory, no GPU
resources  registers, spills, shared memory, occupancy and instructions of a captured launch, per target
"""
