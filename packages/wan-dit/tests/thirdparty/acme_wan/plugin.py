from dataclasses import replace

import wan_text.plugin
import wan_vae.plugin
from wan_vae import hookimpl

# parts for the spaces of the built-in model
_TINY_VAE = next(spec for spec in wan_vae.plugin.wan_vaes() if spec.name == "tiny")
_TINY_TEXT = next(spec for spec in wan_text.plugin.wan_text_encoders() if spec.name == "tiny")
_OWN = {"name": "acme", "weights": None, "format": None, "describe": None}

VAE = replace(_TINY_VAE, **_OWN, target="acme_wan.parts:AcmeVAE", summary="marks a corner")
TEXT = replace(_TINY_TEXT, **_OWN, target="acme_wan.parts:AcmeText", max_tokens=16)

# another width and another space: a backbone reads it by way of a context embedder
WIDE = replace(TEXT, name="acme-wide", target="acme_wan.parts:AcmeWideText", embed_dim=40, embedding_space="acme-wide-1")


@hookimpl
def wan_vaes():
    return [VAE]


@hookimpl
def wan_text_encoders():
    return [TEXT, WIDE]
