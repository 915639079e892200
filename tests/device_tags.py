"""A graphics card that is not there: every tensor carries the name of the device it would be on, and an
operation on tensors of two devices fails.

    with DeviceTags() as tags:
        tags.put(vlm.model)          # as if it had been opened on cuda:0
        run(vlm)                     # vlm.device is cuda:0, inputs are on the CPU until they are moved

Everything is computed on the CPU. The rules are PyTorch's own: tensors of one operation are on one device,
except that a CPU tensor without dimensions may be a partner of any, an index may be on the CPU, and `copy_`
copies from anywhere. What is on the card cannot be pinned and has no NumPy array. Not covered: what C++ does
between two calls from Python, such as the inside of a backward pass.
"""

import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")
Tensor = torch.Tensor
COPIES = (Tensor.copy_, Tensor.data.__set__, Tensor.set_)
FROM_PYTHON = (torch.cat, torch.stack, torch.concat, torch.vstack, torch.hstack)  # no exception for numbers
INDEXED = (Tensor.__getitem__, Tensor.__setitem__)


def is_tensor(x):
    "Whether it is a tensor."
    return isinstance(x, Tensor)


def device_named(device):
    "The device of a device, its name or its number: the one card (pretended), or what there really is."
    device = torch.device("cuda" if isinstance(device, int) else device)
    return CARD if device.type == "cuda" else device


class DeviceTags(TorchFunctionMode):
    "While it is entered, tensors are on pretended devices."

    def __init__(self):
        super().__init__()
        self.on_card = set()  # storages

    def device_of(self, tensor):
        "The pretended device of a tensor."
        with torch._C.DisableTorchFunction():
            try:
                return CARD if tensor.untyped_storage()._cdata in self.on_card else tensor.device
            except (NotImplementedError, RuntimeError):  # inside vmap
                return tensor.device

    def mark(self, tensor, device):
        "Puts a tensor's memory on a pretended device."
        with torch._C.DisableTorchFunction():
            try:
                storage = tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):
                return
        if device != CARD:
            self.on_card.discard(storage._cdata)
        elif storage._cdata not in self.on_card:
            self.on_card.add(storage._cdata)
            weakref.finalize(storage, self.on_card.discard, storage._cdata)

    def put(self, module, device=CARD):
        "Puts all parameters and buffers of a module on a pretended device."
        for tensor in (*module.parameters(), *module.buffers()):
            self.mark(tensor, device)
        return module

    def moved(self, tensor, device, dtype=None):
        "A tensor on another pretended device: a copy, unless it is there already."
        if device not in (CPU, CARD):
            return tensor.to(device, dtype)
        with torch._C.DisableTorchFunction():
            out = tensor if dtype is None else tensor.to(dtype)
            if (
                self.device_of(tensor) != device
                and out.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            ):
                out = out.clone()
        self.mark(out, device)
        return out

    def to(self, tensor, *args, **kwargs):
        "`Tensor.to`."
        other = next((x for x in (*args, *kwargs.values()) if is_tensor(x)), None)
        if other is not None:
            return self.moved(tensor, self.device_of(other), other.dtype)
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        return self.moved(
            tensor, device_named(device) if device is not None else self.device_of(tensor), dtype
        )

    def check(self, func, args, kwargs):
        "The device of an operation. Raises RuntimeError when its tensors are on two."
        tensors = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        if func in INDEXED:
            tensors = [
                args[0],
                *(
                    x
                    for x in tree_leaves(args[1:])
                    if is_tensor(x) and (self.device_of(x) != CPU or len(args) > 2 and x is args[2])
                ),
            ]
        if func in COPIES:
            return self.device_of(args[0])
        devices = {
            self.device_of(x) for x in tensors if func in FROM_PYTHON or x.ndim or self.device_of(x) != CPU
        }
        if len(devices) > 1:
            shapes = ", ".join(f"{tuple(x.shape)} on {self.device_of(x)}" for x in tensors[:6])
            raise RuntimeError(
                f"{getattr(func, '__name__', func)}: expected all tensors to be on the same device, found "
                f"{shapes}"
            )
        return next(iter(devices), self.device_of(tensors[0]) if tensors else CPU)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        asked = getattr(func, "__self__", None)
        if asked is Tensor.device:
            return self.device_of(args[0])
        if asked is Tensor.is_cuda:
            return self.device_of(args[0]) == CARD
        if asked is Tensor.is_cpu:
            return self.device_of(args[0]) == CPU
        if func is Tensor.to:
            return self.to(*args, **kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return self.moved(args[0], CPU if func is Tensor.cpu else CARD)
        if func in (Tensor.pin_memory, Tensor.numpy, Tensor.__array__) and self.device_of(args[0]) == CARD:
            raise RuntimeError(f"{func.__name__}: this tensor {tuple(args[0].shape)} is on {CARD}")
        if func is Tensor.pin_memory:
            return args[0]
        if func is torch._has_compatible_shallow_copy_type and self.device_of(args[0]) != self.device_of(
            args[1]
        ):
            return False
        device = self.check(func, args, kwargs)
        if kwargs.get("device") is not None:
            device = device_named(kwargs["device"])
            kwargs = kwargs | {"device": CPU if device == CARD else device}
        args = tree_map(lambda x: CPU if isinstance(x, torch.device) and x == CARD else x, args)
        out = func(*args, **kwargs)
        if device == CARD:
            for x in tree_leaves(out):
                if is_tensor(x):
                    self.mark(x, CARD)
        return out


def pinned(tags, batch):
    """Pins every tensor of a batch (dicts, lists, objects), as a DataLoader beside a card does.

    Raises RuntimeError for one on the card.
    """
    if is_tensor(batch):
        return batch.pin_memory()
    if isinstance(batch, dict):
        return {k: pinned(tags, v) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [pinned(tags, v) for v in batch]
    if hasattr(batch, "__dict__"):
        pinned(tags, vars(batch))
    return batch
