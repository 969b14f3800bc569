"""``bound_opts``: which keys mean something here, which are accepted, and what they become."""

from __future__ import annotations

import copy
import difflib
import warnings
from typing import Any

from pycert.options import SOUNDNESS

#: Names of relaxations of ReLU here and there.
SLOPES = {
    "adaptive": "adaptive",
    "same-slope": "parallel",
    "zero-lb": "zero",
    "one-lb": "one",
}
_DEFAULT_ASCENT: dict[str, Any] = {
    "enable_alpha_crown": True,
    "enable_beta_crown": False,
    "apply_output_constraints_to": [],
    "tighten_input_bounds": False,
    "best_of_oc_and_no_oc": False,
    "directly_optimize": [],
    "iteration": 20,
    "use_shared_alpha": False,
    "lr_alpha": 0.5,
}
#: Of ``optimize_bound_args``: accepted, without meaning.
_ASCENT_WITHOUT_MEANING = frozenset(
    """oc_lr share_gammas optimizer keep_best lr_beta lr_cut_beta init_alpha lr_coeffs
    intermediate_refinement_layers loss_reduction_func stop_criterion_func lr_decay early_stop_patience
    start_save_best use_float64_in_last_iteration pruning_in_iteration pruning_in_iteration_threshold
    multi_spec_keep_func deterministic max_time fix_intermediate_layer_bounds lr_init_alpha fix_interm_bounds
    verbosity""".split()
)
_DEFAULTS: dict[str, Any] = {
    "activation_bound_option": "adaptive",
    "compare_crown_with_ibp": False,
    "loss_fusion": False,
    "soundness": "none",
    "memory": None,
}
_WITHOUT_MEANING = frozenset(
    """conv_mode sparse_intermediate_bounds
    sparse_conv_intermediate_bounds sparse_intermediate_bounds_with_ibp
    sparse_features_alpha sparse_spec_alpha minimum_sparsity
    crown_batch_size forward_refinement forward_max_dim
    use_full_conv_alpha use_full_conv_alpha_thresh disabled_optimization disable_optimization verbosity
    optimize_graph forward_before_compute_bounds clip_in_alpha_crown bound_every_node final_shape
    enable_opt_interm_bounds batched_crown_max_vram_ratio max_crown_size deterministic matmul
    no_ibp_loss_fusion ibp_relative bn mul softmax
    exp hardtanh recurjac reshape middle buffers share_alphas fixed_reducemax_index auto_requires_grad
    tanh sigmoid leaky_relu maxpool""".split()
)
#: They choose a layout or save memory there and change no bound: not worth a warning.
_SILENT = frozenset(("conv_mode", "verbosity", "bound_every_node", "final_shape", "deterministic"))

_warned: set[str] = set()


class BoundOpts:
    """The options of a bounded module, checked."""

    def __init__(self, given: dict[str, Any] | None) -> None:
        self.values: dict[str, Any] = copy.copy(_DEFAULTS)
        self.values["optimize_bound_args"] = copy.deepcopy(_DEFAULT_ASCENT)
        self.update(given or {})

    def update(self, given: dict[str, Any]) -> None:
        """Takes over ``given``.

        Raises:
            ValueError: an unknown key or value.
            NotImplementedError: a known value that is not supported.
        """
        meaningless = []
        for key, value in given.items():
            if key == "relu":  # the older name
                key = "activation_bound_option"
            if key == "optimize_bound_args":
                meaningless += self._update_ascent(value)
            elif key in _DEFAULTS:
                self.values[key] = self._checked(key, value)
            elif key in _WITHOUT_MEANING:
                self.values[key] = value
                meaningless += [key] if key not in _SILENT else []
            else:
                raise ValueError(_unknown("bound_opts", key, {*_DEFAULTS, *_WITHOUT_MEANING, "relu"}))
        fresh = [key for key in meaningless if key not in _warned]
        if fresh:
            _warned.update(fresh)
            warnings.warn("bound_opts without meaning here: " + ", ".join(sorted(fresh)), stacklevel=4)

    def _update_ascent(self, given: dict[str, Any]) -> list[str]:
        ascent = self.values["optimize_bound_args"]
        for key, value in given.items():
            if key not in _DEFAULT_ASCENT and key not in _ASCENT_WITHOUT_MEANING:
                known = {*_DEFAULT_ASCENT, *_ASCENT_WITHOUT_MEANING}
                raise ValueError(_unknown("optimize_bound_args", key, known))
            if key == "enable_beta_crown" and value:
                raise NotImplementedError("optimize_bound_args: enable_beta_crown is not supported")
            ascent[key] = value
        return [key for key in given if key not in _DEFAULT_ASCENT]

    @staticmethod
    def _checked(key: str, value: Any) -> Any:
        if key == "activation_bound_option":
            value = "adaptive" if value is None else value
            if value == "reversed-adaptive":
                raise NotImplementedError("activation_bound_option 'reversed-adaptive' is not supported")
            if value not in SLOPES:
                accepted = ", ".join(map(repr, SLOPES))
                raise ValueError(f"activation_bound_option must be one of {accepted}, got {value!r}")
        if key == "soundness" and value not in SOUNDNESS:
            raise ValueError(f"soundness must be one of {', '.join(map(repr, SOUNDNESS))}, got {value!r}")
        return value

    @property
    def slope(self) -> str:
        return SLOPES[self.values["activation_bound_option"]]

    def of(self, method: str) -> dict[str, Any]:
        """Options of :meth:`pycert.BoundedModule.bound` for one of pycert's methods."""
        options: dict[str, Any] = {
            "slope": self.slope,
            "soundness": self.values["soundness"],
            "intersect": bool(self.values["compare_crown_with_ibp"]),
            "pooling": "constant",
        }
        if self.values["memory"] is not None:
            options["memory"] = self.values["memory"]
        if method == "alpha-crown":
            ascent = self.values["optimize_bound_args"]
            options |= {
                "iterations": int(ascent["iteration"]) if ascent["enable_alpha_crown"] else 0,
                "learning_rate": float(ascent["lr_alpha"]),
                "alpha": "shared" if ascent["use_shared_alpha"] else "per spec",
                "intermediate": "alpha-crown",
            }
        return options


def _unknown(where: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}.{hint}"
