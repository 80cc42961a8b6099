"""Every method of the package by name; its keyword-only options are what [method_options] may hold."""

from collections.abc import Callable

from fedtri.method import Method
from fedtri.methods.ce_lora import ce_lora
from fedtri.methods.centralized import centralized
from fedtri.methods.ditto import ditto
from fedtri.methods.fed_sb import fed_sb
from fedtri.methods.fedalt import fedalt
from fedtri.methods.feddpa import feddpa
from fedtri.methods.fedex_lora import fedex_lora
from fedtri.methods.fedit import fedit
from fedtri.methods.fedprox import fedprox
from fedtri.methods.fedrot_lora import fedrot_lora
from fedtri.methods.fedsa_lora import fedsa_lora
from fedtri.methods.fedsvd import fedsvd
from fedtri.methods.ffa_lora import ffa_lora
from fedtri.methods.flexlora import flexlora
from fedtri.methods.flora import flora
from fedtri.methods.flora_na import flora_na
from fedtri.methods.full import full
from fedtri.methods.gradient_core import gradient_core
from fedtri.methods.hetlora import hetlora
from fedtri.methods.local import local
from fedtri.methods.lora_fair import lora_fair
from fedtri.methods.pfedme import pfedme
from fedtri.methods.raflora import raflora
from fedtri.methods.ravan import ravan
from fedtri.methods.rolora import rolora

METHODS: dict[str, Callable[..., Method]] = {
    "local": local,
    "centralized": centralized,
    "full": full,
    "fedit": fedit,
    "fedprox": fedprox,
    "ffa_lora": ffa_lora,
    "fedsa_lora": fedsa_lora,
    "rolora": rolora,
    "fedsvd": fedsvd,
    "fedrot_lora": fedrot_lora,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "raflora": raflora,
    "flora": flora,
    "fedex_lora": fedex_lora,
    "lora_fair": lora_fair,
    "fed_sb": fed_sb,
    "gradient_core": gradient_core,
    "ravan": ravan,
    "flora_na": flora_na,
    "ce_lora": ce_lora,
    "ditto": ditto,
    "pfedme": pfedme,
    "feddpa": feddpa,
    "fedalt": fedalt,
}
