"""A sample of ONNX's own test suite through the torch lowering; `benchmarks/torch_conformance.py` runs all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# one or a few cases of every kind of operator
SAMPLE = (
    "test_(add_uint8|div_uint64|mod_mixed_sign_int16|pow_types_float32_int32|clip_default_min|cast_no_saturate_FLOAT_to"
    "_FLOAT8E5M2|gelu_tanh_1|hardmax_one_hot|reduce_log_sum_exp_empty_set|argmax_keepdims_example_select_last_index"
    "|cumsum_1d_reverse_exclusive|conv_with_autopad_same|convtranspose_output_shape|deform_conv_with_mask_bias"
    "|maxpool_with_argmax_2d_precomputed_strides|averagepool_2d_ceil|layer_normalization_4d_axis_negative_2|rms_norm.*2d"
    "|attention_3d_gqa_causal|attention_4d_diff_heads_mask4d_padded_kv|attention_local_window|rotary_embedding_3d"
    "|gather_elements_negative|scatternd_max|slice_negative_axes|unique_not_sorted|nonmaxsuppression_two_classes"
    "|resize_(down|up)sample_s(cales|izes)_(cubic|linear|nearest)|gridsample_reflection|roialign_mode_max|affine_grid_3d"
    "|lstm_with_peepholes|gru_seq_length|rnn_seq|quantizelinear_blocked_asym|dequantizelinear_e4m3fn$|qlinearconv"
    "|matmulinteger|if_seq|loop13_seq|scan9_sum|sequence_map_add_2|split_to_sequence_nokeepdims|dft_inverse"
    "|stft_with_window|nllloss_NCd1d2_weighted_mean|sce_mean_3d_log|center_crop_pad|col2im_5d|einsum_batch|tensorscatter)"
)


def test_no_case_of_the_sample_is_wrong() -> None:
    command = [sys.executable, "-W", "ignore", BENCHMARKS / "torch_conformance.py", "--json", "--only", SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["wrong"] == 0 and figures["unsupported"] == {} and figures["passed"] == figures["loaded"] > 100
