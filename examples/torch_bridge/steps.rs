//! Whole training steps, over batches of random pixels that another engine can ask for.

use std::ffi::{CStr, c_char};

use trencadis::device::Device;
use trencadis::{Error, Result};

use super::training::{Training, fitting};
use super::{code, copy, handle};

/// What some steps did, see [`super::training::Run`].
#[repr(C)]
pub struct TrainingRun {
    pub seconds: f64,
    /// Of all steps.
    pub tokens: f64,
    pub images: f64,
    /// Model FLOPs.
    pub flops: f64,
    /// Seconds for which the device had nothing to do between steps.
    pub idle: f64,
    /// Loss of the training's first step and of the newest.
    pub first_loss: f64,
    pub loss: f64,
}

/// # Safety
/// `text` ends with 0.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a str> {
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(Error::usage)
}

/// A training of a recipe on GPU 0, in its primary context, over `batches` batches; null where there is none.
/// `sets` are lines `section.key=value` over the recipe.
///
/// # Safety
/// Both texts end with 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_training_open(
    recipe: *const c_char,
    sets: *const c_char,
    classes: u64,
    batches: u64,
) -> *mut Training {
    let open = || {
        // SAFETY: as the caller promises.
        let (recipe, sets) = unsafe { (text(recipe)?, text(sets)?) };
        let sets: Vec<String> = sets.lines().map(str::to_owned).collect();
        let (classes, batches) = (classes as usize, batches.max(1) as usize);
        trencadis::recipe::Recipe::load(recipe, &sets)?; // Told even where there is no GPU.
        let device = Device::cuda(0)?;
        Training::open(&device, &fitting(&device, recipe, &sets, classes)?, classes, batches)
    };
    handle(open())
}

/// Gives back a training with all its memory.
///
/// # Safety
/// `training` is of [`trencadis_training_open`] and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_training_close(training: *mut Training) {
    if !training.is_null() {
        // SAFETY: as the caller promises.
        drop(unsafe { Box::from_raw(training) });
    }
}

/// Copies a JSON object, cut to `capacity` bytes, and returns its length: the whole `recipe`, `width`, `depth`, `mlp`
/// and `heads` of the model, `slots` and `patch_dim` of a batch, and `memory_bytes` on the device.
///
/// # Safety
/// `training` is open, `text` has room for `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_training_describe(
    training: *const Training,
    text: *mut c_char,
    capacity: u64,
) -> i64 {
    // SAFETY: as the caller promises.
    let training = unsafe { &*training };
    let recipe = training.recipe();
    code(recipe.model.dimensions().map(|dims| {
        let described = serde_json::json!({
            "recipe": recipe,
            "width": dims.width,
            "depth": dims.depth,
            "mlp": dims.mlp,
            "heads": dims.heads,
            "slots": training.batches()[0].slots(),
            "patch_dim": recipe.model.patch_dim(),
            "memory_bytes": training.memory().total(),
        });
        // SAFETY: as the caller promises.
        unsafe { copy(&described.to_string(), text, capacity) }
    }))
}

/// Copies where the images of a batch lie, `[slots + 1]`, and row and column of each of its tokens, `[tokens, 2]`.
/// Returns how many images there are.
///
/// # Safety
/// `training` is open, the others have room for what they are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_training_batch(
    training: *const Training,
    at: u64,
    cu_seqlens: *mut i32,
    positions: *mut u16,
) -> i64 {
    // SAFETY: as the caller promises.
    let training = unsafe { &*training };
    let Some(batch) = training.batches().get(at as usize) else {
        let count = training.batches().len();
        return code(Err(Error::usage(format!("there is no batch {at}, there are {count}"))));
    };
    let flat = batch.positions.as_flattened();
    // SAFETY: as the caller promises.
    unsafe {
        cu_seqlens.copy_from_nonoverlapping(batch.cu_seqlens.as_ptr(), batch.cu_seqlens.len());
        positions.copy_from_nonoverlapping(flat.as_ptr(), flat.len());
    }
    batch.images as i64
}

/// Runs steps and waits for them.
///
/// # Safety
/// `training` is open, `run` is a struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trencadis_training_run(
    training: *mut Training,
    steps: u64,
    run: *mut TrainingRun,
) -> i64 {
    // SAFETY: as the caller promises.
    let (training, result) = unsafe { (&mut *training, &mut *run) };
    code(training.run(steps as usize).map(|run| {
        *result = TrainingRun {
            seconds: run.seconds,
            tokens: run.tokens,
            images: run.images,
            flops: run.flops,
            idle: run.idle,
            first_loss: run.first_loss,
            loss: run.loss,
        };
        0
    }))
}
