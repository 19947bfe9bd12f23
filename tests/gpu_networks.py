"""The whole skip-only network on GPU kernels against the plain path in float64: logits, loss, every gradient."""

from gpu_stages import error
from kinks import near, values
from networks import batch_of, gradients, net_of

from ftso_fast import kernels

MARGIN = 2e-6
ALLOWED = 1e-5
"""Or three times what the plain path in float32 is off by, where that is more: these batches are small."""


def example(cells, channels, k, in_channels, B, H, W):
    """A network and a batch of which no ReLU input and no runner-up of the pooling is so near to its kink that float32
    could turn it over; both in float64, rounded to float32."""
    for seed in range(1000):
        net = net_of(seed, classes=3, channels=channels, layers=cells, k=k, in_channels=in_channels).float().double()
        images, labels = batch_of(seed, (B, in_channels, H, W), 3)
        images = images.float().double()
        outputs = values(net, images)
        if not near(net, outputs, [MARGIN * x.square().mean((0, 2, 3), keepdim=True).sqrt() for x in outputs]):
            return net, images, labels
    raise ValueError("no draw is off its kinks")


def on(device, net):
    """In float32 on the device."""
    net = net.float().to(device)
    for name in ("betas_normal", "betas_reduce"):
        setattr(net, name, getattr(net, name).detach().to(device).requires_grad_())
    return net


def agrees(shape, device):
    """Raises where Triton's backend is off; returns the kernels that ran. shape: what `example` takes."""
    net, images, labels = example(*shape)
    inputs = [*net.betas(), *net.parameters()]
    with kernels.use_backend("reference"):
        wanted = [net(images).detach(), *gradients(net, images, labels, inputs)]
    net, images, labels = on(device, net), images.float().to(device), labels.to(device)
    inputs = [*net.betas(), *net.parameters()]
    names = ["logits", "loss", "normal", "reduce", *(name for name, _ in net.named_parameters())]
    errors = {}
    for backend in ("reference", "triton"):
        before = kernels.calls()
        with kernels.use_backend(backend):
            found = [net(images).detach(), *gradients(net, images, labels, inputs)]
        ran = {name for name, n in kernels.calls().items() if n != before.get(name, 0)}
        errors[backend] = {n: error(a.cpu(), b) for n, a, b in zip(names, found, wanted, strict=True)}
    allowed = max(ALLOWED, 3 * max(errors["reference"].values()))
    assert allowed < 1e-4
    assert not {name: e for name, e in errors["triton"].items() if not e <= allowed}
    return ran
