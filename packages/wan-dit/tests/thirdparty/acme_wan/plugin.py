from wan_text import TextEncoderSpec
from wan_vae import VAESpec, hookimpl

VAE = VAESpec("acme", "acme_wan.parts:AcmeVAE", latent_space="tiny-1", latent_channels=8, stride=(4, 8, 8), summary="marks a corner")
TEXT = TextEncoderSpec("acme", "acme_wan.parts:AcmeText", embedding_space="tiny-1", embed_dim=96, max_tokens=16)


@hookimpl
def wan_vaes():
    return [VAE]


@hookimpl
def wan_text_encoders():
    return [TEXT]
