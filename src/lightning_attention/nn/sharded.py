"""Initial values for a parameter that may be sharded over ranks."""

from torch import Tensor


def laid_out_like(values: Tensor, parameter: Tensor) -> Tensor:
    """``values``, whole on every rank, on the device of ``parameter``, and sharded as it is where it is a DTensor.

    Only a DTensor can be copied into a DTensor. Nothing is communicated.
    """
    values = values.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return values
    # Here, since it is missing in some builds and takes its time.
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
