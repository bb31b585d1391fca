"""The kernels for CUDA and ROCm devices, in Triton."""
