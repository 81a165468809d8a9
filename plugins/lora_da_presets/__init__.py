"""The named settings that `preset=` takes."""

from lora_da_core import LoraDAConfig, Preset, hookimpl

PAPER = Preset(
    name="paper",
    summary="the original program's settings: absolute damping 1e-6, all tokens, both factors divided by √1024",
    estimator=("kfac", {"output": "diagonal"}),
    config=LoraDAConfig(
        alpha=1.0,
        beta=0.03,
        scale="fixed",
        gamma=1024.0,
        token_mask="attention",
        damping=1e-6,
        damping_kind="absolute",
    ),
)

ROBUST = Preset(
    name="robust",
    summary="the default: relative damping, label tokens, a scale searched on the samples",
    estimator=("kfac", {"output": "diagonal"}),
    config=LoraDAConfig(),
)

LORA_ONE = Preset(
    name="lora_one",
    summary="LoRA-One (arXiv 2502.01235): the gradient's singular subspace, divided evenly; the scale is searched",
    estimator="identity",
    config=LoraDAConfig(beta=0.0, balance="even"),
)

SPECTRAL = Preset(
    name="spectral",
    summary="gradient flow's spectral start (arXiv 2503.06982): as lora_one, all singular values alike",
    estimator="identity",
    config=LoraDAConfig(beta=0.0, balance="even", spectrum="flat"),
)


LORA_GA = Preset(
    name="lora_ga",
    summary="LoRA-GA (arXiv 2407.05000): A the gradient's first, B its next singular vectors; wants an offset",
    estimator="identity",
    config=LoraDAConfig(beta=0.0, pairing="right_first", scale="stable"),
)

LOI = Preset(
    name="loi",
    summary="Riemannion's LOI (arXiv 2507.12142): B the first, A the next singular vectors; wants an offset",
    estimator="identity",
    config=LoraDAConfig(beta=0.0, pairing="left_first", scale="product", balance="even"),
)

EVA = Preset(
    name="eva",
    summary="EVA (arXiv 2410.07170): A from the inputs' second moment, B zero; no backward pass",
    estimator=("kfac", {"output": "identity"}),
    gradient="none",
    config=LoraDAConfig(alpha=0.0, beta=1.0, damping=1.0, scale="fixed", gamma=1.0),
)

PISSA = Preset(
    name="pissa",
    summary="PiSSA (arXiv 2404.02948): the principal part of the weights, divided evenly; wants an offset",
    estimator="identity",
    gradient="weights",
    config=LoraDAConfig(beta=0.0, damping=1.0, normalize=False, scale="unit", balance="even"),
)

LORA_FA = Preset(
    name="lora_fa",
    summary="LoRA-FA (arXiv 2308.03303) with LoRA-DA's A: as robust, A stays frozen in training",
    estimator=("kfac", {"output": "diagonal"}),
    config=LoraDAConfig(frozen="A"),
)


@hookimpl
def lora_da_presets() -> list[Preset]:
    """Offers `paper`, `robust` and the special cases by the names of their methods."""
    return [PAPER, ROBUST, LORA_ONE, SPECTRAL, LORA_GA, LOI, EVA, PISSA, LORA_FA]
