"""All trainable parameters as one vector: one optimizer step, one norm, one mask and one all-reduce for all of them."""

from itertools import accumulate

import torch

ALIGN = 16  # elements; every parameter starts at a multiple, which vector units and compiled kernels want


class FlatParameters:
    """Moves parameters and their gradients into two vectors; the modules keep views of them and notice nothing.

    Each view has its parameter's own layout (channels_last on a GPU), so the vector's order is this device's: `split`
    and `join` translate it to and from separate tensors in the standard layout, for checkpoints.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        *self.starts, size = accumulate((-(-p.numel() // ALIGN) * ALIGN for p in parameters), initial=0)
        self.vector = torch.nn.Parameter(parameters[0].data.new_zeros(size))
        self.gradient = self.vector.grad = torch.zeros_like(self.vector.data)
        for p, value, gradient in zip(parameters, *map(self.views, (self.vector.data, self.gradient)), strict=True):
            value.copy_(p.data)
            p.data, p.grad = value, gradient

    def views(self, vector: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
        """Views of a vector of the parameters from the `first` on, in their shapes and layouts."""
        begin = vector.storage_offset() - self.starts[first]
        pairs = zip(self.parameters[first:], self.starts[first:], strict=True)
        return [vector.as_strided(p.shape, p.stride(), begin + start) for p, start in pairs]

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector of the optimizer as one contiguous tensor a parameter."""
        return [view.clone(memory_format=torch.contiguous_format) for view in self.views(vector)]

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """What `split` took apart."""
        vector = torch.zeros_like(self.vector.data)
        for view, tensor in zip(self.views(vector), tensors, strict=True):
            if view.shape != tensor.shape:  # copy_ would spread a smaller one over the view
                raise ValueError(f"a moment is {list(tensor.shape)} and its parameter {list(view.shape)}")
            view.copy_(tensor)
        return vector
