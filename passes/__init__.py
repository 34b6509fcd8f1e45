"""Every pass by name. A new pass is one import and one line here."""

from __future__ import annotations

from xform.rewrite.passes import Pass

PASSES: dict[str, type[Pass]] = {
    pass_class.name: pass_class
    for pass_class in (
        # canonicalize
        # reparameterize
        # cleanup
    )
}
