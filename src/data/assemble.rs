//! From a plan to a packed batch: layout first, then the images, decoded in parallel straight
//! into their rows, or as pictures that a device cuts them from ([`pictures`]).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use crate::data::batch::{Mixture, PREFIX, PackedBatch, Patches, Targets};
use crate::data::mix::Mix;
use crate::data::packing::{BatchPlan, PackingSettings, PlannedImage};
use crate::data::patchify::Patchifier;
use crate::data::pictures::{self, Seen};
use crate::data::source::{Image, Source};
use crate::data::texts::TextSettings;
use crate::data::view::{ViewSettings, Viewer};
use crate::error::{Error, Result};
use crate::kernels::view::{Shares, Views};
use crate::recipe::MixConfig;

/// Makes batches from plans; the bits do not depend on the number of threads.
pub struct Assembler<'a> {
    source: &'a dyn Source,
    settings: PackingSettings,
    patchifier: Patchifier,
    /// What a device makes patches of, and what a token may take of that; none where they are made here.
    pictures: Option<(Views, Shares)>,
    mix: MixConfig,
    texts: Option<TextSettings>,
    /// One per thread.
    viewers: Vec<Viewer<'a>>,
}

/// A batch with what could not be read for it.
#[derive(Clone, Debug)]
pub struct Assembled {
    /// The batch.
    pub batch: PackedBatch,
    /// Samples that could not be read, with the cause, which names the file.
    pub unreadable: Vec<(u64, String)>,
    /// Slots whose image is as it is since the one that it was to be mixed with could not be read.
    pub unmixed: Vec<usize>,
    /// How many images were to be mixed into others.
    pub partners: usize,
    /// Samples whose text was cut off.
    pub cut: Vec<u64>,
}

/// An image that is being filled in.
struct Task<'p, 'b> {
    slot: usize,
    image: &'p PlannedImage,
    mix: Option<Mix>,
    kept: Vec<u32>,
    to: To<'b>,
}

/// Where an image goes.
enum To<'b> {
    /// Its patches.
    Rows(&'b mut [u8]),
    /// What a device makes them of, of which a token may take so much.
    Pictures(&'b mut Seen, Shares),
}

/// A sample that could not be read.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Failed {
    slot: usize,
    /// Whether it is the one to be mixed into that of the slot.
    partner: bool,
    cause: String,
}

impl<'a> Assembler<'a> {
    /// Batches of the images of `source`, each as `view` has it and mixed with another as `mix` says; `threads` ≥ 1
    /// decode at a time.
    pub fn new(
        source: &'a dyn Source,
        settings: PackingSettings,
        view: ViewSettings,
        mix: MixConfig,
        threads: usize,
    ) -> Self {
        let patchifier = Patchifier::new(settings.patch, view.channels);
        let pictures = view.on_device.then(|| {
            let (tokens, slots) = (settings.packing.tokens, settings.slots);
            let (channels, side, mixed) = (view.channels, settings.patch, mix.is_on());
            (Views::new(tokens, slots, channels, side, mixed), Shares::of_token(side, channels, mixed))
        });
        let viewers = (0..threads.max(1)).map(|_| Viewer::new(source, view.clone())).collect();
        Self { source, settings, patchifier, pictures, mix, texts: None, viewers }
    }

    /// What messages call a sample.
    pub fn name(&self, sample: u64) -> String {
        self.source.name(sample as usize)
    }

    /// The same with the texts of the images.
    pub fn with_texts(self, texts: Option<TextSettings>) -> Self {
        Self { texts, ..self }
    }

    /// The batch of a plan. Images that could not be read keep their slots, with zero patches and weight 0; those whose
    /// partner could not be read are not mixed. Returns early, with images missing, once `stop` is set.
    pub fn assemble(&mut self, plan: &BatchPlan, stop: &AtomicBool) -> Assembled {
        let prefix = self.settings.prefix;
        let patch_dim = self.patchifier.patch_dim();
        let (tokens, slots) = (self.settings.packing.tokens, self.settings.slots);
        let mut seen = vec![Seen::default(); self.pictures.map_or(0, |_| plan.images.len())];
        let mut patches = vec![0u8; if self.pictures.is_some() { 0 } else { tokens * patch_dim }];
        let mut positions = vec![[0u16; 2]; tokens];
        let mut cu_seqlens = vec![0i32; slots + 1];
        let mut grids = vec![[0u16; 2]; slots];
        let mut classes = vec![0i32; slots];
        let mut weights = vec![0f32; slots];
        let mut sample_ids = vec![0u64; slots];
        let mut epochs = vec![0u64; slots];
        let mixes: Vec<Option<Mix>> = plan.images.iter().map(|image| self.mix(image)).collect();

        let mut tasks = Vec::with_capacity(plan.images.len());
        let (mut free, mut start, mut places) = (patches.as_mut_slice(), 0, seen.iter_mut());
        for (slot, (image, mix)) in plan.images.iter().zip(&mixes).enumerate() {
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
            let to = match (places.next(), self.pictures) {
                (Some(seen), Some((_, share))) => To::Pictures(seen, share),
                _ => {
                    let (own, rest) = std::mem::take(&mut free).split_at_mut(image.tokens * patch_dim);
                    free = rest;
                    To::Rows(&mut own[prefix * patch_dim..])
                }
            };
            tasks.push(Task { slot, image, mix: mix.clone(), kept, to });
        }
        cu_seqlens[plan.images.len() + 1..].fill(start as i32);

        let mut failed = self.fill(tasks, stop);
        let (texts, cut) = match &self.texts {
            Some(texts) => {
                let (batch, cut) = self.texts_of(texts, plan, &mut failed, stop);
                (Some(Box::new(batch)), cut)
            }
            None => (None, Vec::new()),
        };
        failed.sort_unstable();
        let mut unmixed = Vec::new();
        for Failed { slot, partner, .. } in &failed {
            match partner {
                true => unmixed.push(*slot),
                false => weights[*slot] = 0.0,
            }
        }
        let partner = |slot: usize| mixes[slot].as_ref().map_or(0, |mix| mix.partner);
        let unreadable = failed.iter().map(|failed| {
            let sample = if failed.partner { partner(failed.slot) } else { plan.images[failed.slot].sample };
            (sample, failed.cause.clone())
        });
        let unreadable = unreadable.collect();
        let targets = match self.mix.is_on() {
            true => Targets::Mixed(self.mixtures(plan, &classes, &mixes, &unmixed)),
            false => Targets::Classes(classes),
        };
        let patches = match self.pictures {
            Some((shape, _)) => Patches::Pictures(pictures::gather(seen, &cu_seqlens, &positions, shape)),
            None => Patches::U8(patches),
        };
        let batch = PackedBatch {
            patches,
            patch_dim,
            cu_seqlens,
            positions,
            grids,
            targets,
            weights,
            sample_ids,
            epochs,
            images: plan.images.len(),
            texts,
        };
        Assembled { batch, unreadable, unmixed, partners: mixes.iter().flatten().count(), cut }
    }

    /// The texts of the images, and the samples whose text was cut off. A slot whose text cannot be used has one token
    /// instead, and has failed.
    fn texts_of(
        &self,
        settings: &TextSettings,
        plan: &BatchPlan,
        failed: &mut Vec<Failed>,
        stop: &AtomicBool,
    ) -> (PackedBatch, Vec<u64>) {
        let tokens_of = |image: &PlannedImage| {
            let sample = image.sample as usize;
            if stop.load(Ordering::Relaxed) {
                return Err(format!("{}: loading was stopped", self.source.name(sample)));
            }
            let text = self.source.caption(sample).map_err(|cause| cause.to_string())?;
            settings.encode(&text).map_err(|why| format!("{}: {why}", self.source.name(sample)))
        };
        let tokens: Vec<_> = match self.viewers.len() {
            1 => plan.images.iter().map(tokens_of).collect(),
            _ => plan.images.par_iter().map(tokens_of).collect(),
        };
        let (mut texts, mut cut) = (Vec::with_capacity(plan.images.len()), Vec::new());
        for ((slot, image), tokens) in plan.images.iter().enumerate().zip(tokens) {
            match tokens {
                Ok(tokens) => {
                    cut.extend(tokens.cut.then_some(image.sample));
                    texts.push(tokens.ids);
                }
                Err(cause) => {
                    if !failed.iter().any(|failed| failed.slot == slot) {
                        failed.push(Failed { slot, partner: false, cause });
                    }
                    texts.push(vec![0]);
                }
            }
        }
        (settings.pack(&texts), cut)
    }

    /// What an image is mixed with.
    fn mix(&self, image: &PlannedImage) -> Option<Mix> {
        let size = (image.target.height, image.target.width);
        Mix::draw(&self.mix, self.settings.seed, (image.epoch, image.sample), self.source.len(), size)
    }

    /// Targets of all slots, of which the used ones have these `classes`.
    fn mixtures(
        &self,
        plan: &BatchPlan,
        classes: &[i32],
        mixes: &[Option<Mix>],
        unmixed: &[usize],
    ) -> Vec<Mixture> {
        let mut mixtures: Vec<Mixture> = classes.iter().map(|&class| Mixture::one(class)).collect();
        for (slot, (image, mix)) in plan.images.iter().zip(mixes).enumerate() {
            let (Some(mix), false) = (mix, unmixed.contains(&slot)) else { continue };
            let share = mix.share((image.target.height, image.target.width));
            let other = self.source.label(mix.partner as usize) as i32;
            let mixture = Mixture::new(classes[slot], other, share);
            mixtures[slot] = if self.mix.binarise { mixture.binarised() } else { mixture };
        }
        mixtures
    }

    /// Runs the tasks on all threads, the calling one among them; returns the failures.
    fn fill(&mut self, tasks: Vec<Task<'_, '_>>, stop: &AtomicBool) -> Vec<Failed> {
        let (source, settings, patchifier) = (self.source, &self.settings, self.patchifier);
        let of_patch = (settings.patch, patchifier.patch_dim() / settings.patch.pow(2));
        let tasks = Mutex::new(tasks.into_iter());
        let work = |viewer: &mut Viewer<'_>| {
            let mut failed = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let Some(task) = tasks.lock().ok().and_then(|mut tasks| tasks.next()) else { break };
                let Task { slot, image, mix, kept, to } = task;
                let fail = |partner, cause| failed.push(Failed { slot, partner, cause });
                let mut look = Look { source, settings, viewer: &mut *viewer, image, mix, fail };
                match to {
                    To::Pictures(seen, share) => *seen = look.pictures(&kept, of_patch, share),
                    To::Rows(rows) => {
                        if let Some(pixels) = look.pixels()
                            && let Err(error) = patchifier.write(&pixels, &image.target, &kept, rows)
                        {
                            let name = source.name(image.sample as usize);
                            (look.fail)(false, format!("{name}: {error}"));
                        }
                    }
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

/// An image that is looked at, with the one that is mixed into it. `fail` is told which of the two cannot be read (the
/// partner or not), and why.
struct Look<'l, 's, F: FnMut(bool, String)> {
    source: &'l dyn Source,
    settings: &'l PackingSettings,
    viewer: &'l mut Viewer<'s>,
    image: &'l PlannedImage,
    mix: Option<Mix>,
    fail: F,
}

impl<'s, F: FnMut(bool, String)> Look<'_, 's, F> {
    /// The pixels of its target; none where it cannot be read.
    fn pixels(&mut self) -> Option<Image> {
        let mut pixels = self.own(Viewer::view)?;
        if let Some(mix) = self.mix.clone()
            && let Some(other) = self.partner(mix.partner, Viewer::view)
        {
            mix.apply(&mut pixels.pixels, &other.pixels, pixels.width, pixels.channels);
        }
        Some(pixels)
    }

    /// What a device makes the patches `kept`, of so many pixels a side and channels, of; zeros where it cannot be read.
    fn pictures(&mut self, kept: &[u32], of_patch: (usize, usize), share: Shares) -> Seen {
        let room = share.of(self.image.tokens);
        let room = if self.mix.is_some() { room.half() } else { room };
        let picture = |viewer: &mut Viewer<'_>, image: &PlannedImage| viewer.picture(image, room);
        let (mut own, mut other) = (None, None);
        match (self.own(picture), self.mix.clone()) {
            (None, _) => {}
            (Some(Err(pixels)), None) => own = Some(pixels),
            (Some(Err(pixels)), Some(mix)) => {
                (own, other) = (Some(pixels), self.partner(mix.partner, Viewer::view));
            }
            (Some(Ok(picture)), None) => return vec![picture].into(),
            (Some(Ok(first)), Some(mix)) => match self.partner(mix.partner, picture) {
                None => return vec![first].into(),
                Some(Ok(second)) => return vec![first.mixed(&pictures::mixed(&mix)), second].into(),
                Some(Err(pixels)) => (own, other) = (self.own(Viewer::view), Some(pixels)),
            },
        }
        if let (Some(own), Some(other), Some(mix)) = (&mut own, &other, &self.mix) {
            mix.apply(&mut own.pixels, &other.pixels, own.width, own.channels);
        }
        let seen = pictures::cut(own.as_ref(), self.image, kept, of_patch);
        seen.unwrap_or_else(|| {
            let name = self.source.name(self.image.sample as usize);
            (self.fail)(
                false,
                format!("{name}: its patches have no room as a picture; set data.views=\"host\""),
            );
            Seen::default()
        })
    }

    fn own<T>(&mut self, view: impl Fn(&mut Viewer<'s>, &PlannedImage) -> Result<T>) -> Option<T> {
        let Self { source, viewer, image, fail, .. } = self;
        guarded(*source, image.sample, || view(viewer, image)).map_err(|cause| fail(false, cause)).ok()
    }

    /// Sample `other` in the place of the image.
    fn partner<T>(
        &mut self,
        other: u64,
        view: impl Fn(&mut Viewer<'s>, &PlannedImage) -> Result<T>,
    ) -> Option<T> {
        let Self { source, settings, viewer, image, fail, .. } = self;
        let placed = || {
            let size = source.size(other as usize)?;
            if size.0 == 0 || size.1 == 0 {
                let name = source.name(other as usize);
                return Err(Error::usage(format!(
                    "{name}: an image of {}x{} pixels is empty",
                    size.0, size.1
                )));
            }
            view(viewer, &settings.in_place(image, other, size))
        };
        guarded(*source, other, placed).map_err(|cause| fail(true, cause)).ok()
    }
}

/// What is made of a sample, or why nothing is. A decoder that panics on a damaged file costs that file, not the run.
fn guarded<T>(source: &dyn Source, sample: u64, view: impl FnOnce() -> Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(view)) {
        Ok(viewed) => viewed.map_err(|error| error.to_string()),
        Err(_) => Err(format!("{}: the decoder panicked", source.name(sample as usize))),
    }
}
