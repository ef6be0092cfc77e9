"""Demo data whose information is known: latents with closed forms, English sentences, audio and vision sequences."""
