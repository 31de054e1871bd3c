"""The reference text-to-image training system: model, training, tuning, sampling.

config.py                 the options of a run, from which the command line is made
model.py                  text encoder, image encoder, image decoder
build.py                  model, tokenizer and images from a configuration or a checkpoint
losses.py                 the losses of a step and their fusion
train.py                  the training loop
validation.py             how good the model is, by figures without loss weights
figures.py                what each figure means, from how many images it is, its interval
image_quality.py          SSIM of rebuilt images, a Fréchet distance of generated ones
examples.py               the captions and images that are shown
curves.py                 curves of losses and validations
report.py                 the report, which has them all
run.py                    the jobs behind the command line
tune.py                   the search for the fusion weights
digits_backbone.py        the frozen classifier whose features the digits' losses compare
train_digits_backbone.py  makes its weights, digits_backbone.safetensors
digits_quality.py         quality of generated digits
"""
