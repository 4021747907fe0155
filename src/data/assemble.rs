//! From a plan to a packed batch: layout first, then the images, decoded in parallel straight
//! into their rows.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::data::batch::{PREFIX, PackedBatch, Patches, Targets};
use crate::data::packing::{BatchPlan, PackingSettings, PlannedImage};
use crate::data::patchify::Patchifier;
use crate::data::source::Source;
use crate::data::view::{ViewSettings, Viewer};
use crate::error::Result;

/// Makes batches from plans; the bits do not depend on the number of threads.
pub struct Assembler<'a> {
    source: &'a dyn Source,
    settings: PackingSettings,
    patchifier: Patchifier,
    /// One per thread.
    viewers: Vec<Viewer<'a>>,
}

/// An image that is being filled in.
struct Task<'p, 'b> {
    slot: usize,
    image: &'p PlannedImage,
    kept: Vec<u32>,
    rows: &'b mut [u8],
}

impl<'a> Assembler<'a> {
    /// Batches of the images of `source`, each as `view` has it; `threads` ≥ 1 decode at a time.
    pub fn new(
        source: &'a dyn Source,
        settings: PackingSettings,
        view: ViewSettings,
        threads: usize,
    ) -> Self {
        let patchifier = Patchifier::new(settings.patch, view.channels);
        let viewers = (0..threads.max(1)).map(|_| Viewer::new(source, view.clone())).collect();
        Self { source, settings, patchifier, viewers }
    }

    /// The batch of a plan, and the samples that could not be read, with the cause, which names the
    /// file: their slots keep zero patches and weight 0. Returns early, with images missing, once
    /// `stop` is set.
    pub fn assemble(&mut self, plan: &BatchPlan, stop: &AtomicBool) -> (PackedBatch, Vec<(u64, String)>) {
        let prefix = self.settings.prefix;
        let patch_dim = self.patchifier.patch_dim();
        let (tokens, slots) = (self.settings.packing.tokens, self.settings.slots);
        let mut patches = vec![0u8; tokens * patch_dim];
        let mut positions = vec![[0u16; 2]; tokens];
        let mut cu_seqlens = vec![0i32; slots + 1];
        let mut grids = vec![[0u16; 2]; slots];
        let mut classes = vec![0i32; slots];
        let mut weights = vec![0f32; slots];
        let mut sample_ids = vec![0u64; slots];
        let mut epochs = vec![0u64; slots];

        let mut tasks = Vec::with_capacity(plan.images.len());
        let (mut free, mut start) = (patches.as_mut_slice(), 0);
        for (slot, image) in plan.images.iter().enumerate() {
            let grid = image.target.grid;
            let kept = self.settings.kept(image);
            positions[start..start + prefix].fill(PREFIX);
            for (position, &index) in positions[start + prefix..].iter_mut().zip(&kept) {
                let index = index as usize;
                *position = [(index / grid.cols) as u16, (index % grid.cols) as u16];
            }
            grids[slot] = [grid.rows as u16, grid.cols as u16];
            classes[slot] = self.source.label(image.sample as usize) as i32;
            weights[slot] = 1.0;
            sample_ids[slot] = image.sample;
            epochs[slot] = image.epoch;
            start += image.tokens;
            cu_seqlens[slot + 1] = start as i32;
            let (own, rest) = std::mem::take(&mut free).split_at_mut(image.tokens * patch_dim);
            free = rest;
            tasks.push(Task { slot, image, kept, rows: &mut own[prefix * patch_dim..] });
        }
        cu_seqlens[plan.images.len() + 1..].fill(start as i32);

        let mut failed = self.fill(tasks, stop);
        failed.sort_unstable();
        for (slot, _) in &failed {
            weights[*slot] = 0.0;
        }
        let batch = PackedBatch {
            patches: Patches::U8(patches),
            patch_dim,
            cu_seqlens,
            positions,
            grids,
            targets: Targets::Classes(classes),
            weights,
            sample_ids,
            epochs,
            images: plan.images.len(),
        };
        (batch, failed.into_iter().map(|(slot, cause)| (plan.images[slot].sample, cause)).collect())
    }

    /// Runs the tasks on all threads, the calling one among them; returns the failures.
    fn fill(&mut self, tasks: Vec<Task<'_, '_>>, stop: &AtomicBool) -> Vec<(usize, String)> {
        let (source, patchifier) = (self.source, self.patchifier);
        let tasks = Mutex::new(tasks.into_iter());
        let work = |viewer: &mut Viewer<'_>| {
            let mut failed = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let Some(task) = tasks.lock().ok().and_then(|mut tasks| tasks.next()) else { break };
                let slot = task.slot;
                let sample = task.image.sample as usize;
                // A decoder that panics on a damaged file costs that file, not the run.
                let done = catch_unwind(AssertUnwindSafe(|| write(viewer, patchifier, task)));
                match done {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => failed.push((slot, error.to_string())),
                    Err(_) => failed.push((slot, format!("{}: the decoder panicked", source.name(sample)))),
                }
            }
            failed
        };
        let Some((own, others)) = self.viewers.split_first_mut() else { return Vec::new() };
        std::thread::scope(|scope| {
            let work = &work;
            let handles: Vec<_> = others.iter_mut().map(|viewer| scope.spawn(move || work(viewer))).collect();
            let mut failed = work(own);
            for handle in handles {
                failed.extend(handle.join().unwrap_or_default());
            }
            failed
        })
    }
}

fn write(viewer: &mut Viewer<'_>, patchifier: Patchifier, task: Task<'_, '_>) -> Result<()> {
    let Task { image, kept, rows, .. } = task;
    patchifier.write(&viewer.view(image)?, &image.target, &kept, rows)
}
