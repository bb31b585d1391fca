"""Initial values for a parameter that may be cut over ranks."""

from torch import Tensor


def laid_out_like(values: Tensor, parameter: Tensor) -> Tensor:
    """``values``, which every rank has whole, on the device of ``parameter``; a DTensor cut like it where it is one.

    A DTensor takes nothing else, and nothing is sent.
    """
    values = values.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return values
    # Here, since it is missing in some builds and takes its time.
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
