"""LoRA over a streamed base: adapters are trained, the base model is read from the SSD and never written.

    python lora.py --model DIR --text FILE --steps 30
    python lora.py --model DIR --text FILE --steps 40 --resume out/step-30.ckpt

DIR and FILE are those of ``finetune_lm.py``. A checkpoint has the adapters and their optimizer state alone. In the end
``out/adapter`` is written, which ``PeftModel.from_pretrained`` loads.
"""

from __future__ import annotations

from typing import Any

from finetune_lm import CausalLM, make_parser, module_arguments, train
from lightning.pytorch import seed_everything
from peft import LoraConfig, get_peft_model
from typing_extensions import override


class LoRA(CausalLM):
    """Low-rank adapters (arXiv 2106.09685) in every linear layer of a frozen language model.

    Args:
        rank: Of each adapter.
        args: What a ``CausalLM`` is made of.
    """

    def __init__(self, rank: int, *args: Any) -> None:
        super().__init__(*args)
        self.rank = rank
        self.strict_loading = False  # a checkpoint has no base weights: they come from the model's folder

    @override
    def configure_model(self) -> None:
        is_new = self.model is None
        super().configure_model()
        if is_new:
            # Freezes the base. `all-linear` leaves out the output layer, whose weight is often that of the embedding.
            config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
            self.model = get_peft_model(self.model, config)

    @property
    @override
    def language_model(self) -> Any:
        return self.model.get_base_model()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def main() -> None:
    """Train adapters, save them, report."""
    parser = make_parser(__doc__)
    parser.set_defaults(lr=2e-4)
    parser.add_argument("--rank", type=int, default=8, help="of each adapter")
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    module = LoRA(args.rank, *module_arguments(args))
    train(module, args)
    module.model.save_pretrained(args.out / "adapter")


if __name__ == "__main__":
    main()
