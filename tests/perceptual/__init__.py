"""The losses of deep features; `_kernels` where a file is about the kernels alone.

test_feature_distance.py  the distance of features, and test_feature_distance_kernels.py
test_lpips.py             LPIPS, and test_lpips_kernels.py
test_dists.py             DISTS
test_style.py             Gram matrices
test_tap.py               the tap
test_layer_table.py       lists of layers of every length
test_edges.py             no layers, no channels, no images
test_nonfinite.py         infinities and NaN in features
test_perceptual_loss.py   PerceptualLoss with any network
test_backbones.py         torchvision's networks
test_execution.py         dtypes, compilation, pieces of the batch
test_frozen.py            networks that no model counts among its own
test_scale.py             gradients in float16 networks
test_libraries.py         other libraries' perceptual losses
"""
