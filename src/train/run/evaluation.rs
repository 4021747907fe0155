//! Evaluations of a run.

use std::time::Instant;

use super::Trainer;
use crate::data::loader::LoaderReport;
use crate::data::packing;
use crate::data::texts::TextSettings;
use crate::error::Result;
use crate::eval::metrics::ClassificationReport;
use crate::eval::retrieval::retrieval;
use crate::eval::run::evaluate_on;
use crate::eval::zero_shot::ZeroShot;
use crate::train::checkpoint::Best;
use crate::train::report::EvalReport;

/// What an evaluation found, and what it could not read.
type Evaluated = (ClassificationReport, LoaderReport);

impl Trainer {
    /// Evaluates the weights that will be used, the moving average where there is one. Returns
    /// whether they are the best so far; `None` if it was interrupted.
    pub(super) fn evaluate(&mut self) -> Result<Option<bool>> {
        let begun = Instant::now();
        let interrupt = self.interrupt.clone();
        let stop = || interrupt.requested();
        let done = self.evaluated(&stop)?;
        let Some((metrics, loading)) = done.inspect_err(|_| self.agreed = true)? else { return Ok(None) };
        let step = self.header.progress.step;
        if !metrics.loss.is_finite() {
            return Err(self.diverged(step, &format!("the evaluation's loss is {}", metrics.loss)));
        }
        if loading.unreadable > 0 {
            let example = loading.examples.first().map_or("", String::as_str);
            self.journal.message(&format!(
                "skipped {} unreadable validation images, the first: {example}",
                loading.unreadable
            ));
        }
        self.header.progress.evaluated = Some(step);
        let metric = metrics.top1;
        let best = self.header.progress.best.is_none_or(|b| metric > b.metric);
        if best {
            self.header.progress.best = Some(Best { step, metric });
        }
        let report = EvalReport {
            step,
            loss: metrics.loss,
            top1: metric,
            top5: metrics.top5,
            images: metrics.images,
            best,
            seconds: begun.elapsed().as_secs_f64(),
        };
        let told = self.journal.eval(&report);
        self.keep_unsaid(told)?;
        if self.recipe.train.log_attention {
            self.log_attention(step)?;
        }
        Ok(Some(best))
    }

    /// What an evaluation finds: of a model of images and texts how well it tells the classes by their names, or where
    /// there are none, finds the texts of images. The inner error is that of all ranks.
    fn evaluated(&mut self, stop: &dyn Fn() -> bool) -> Result<Result<Option<Evaluated>>> {
        let (source, recipe) = (self.dataset.validation.clone(), &self.recipe);
        let Some(tokenizer) = &self.tokenizer else {
            let mut model = self.engine.model()?;
            let done = evaluate_on(&self.ranks, model.as_mut(), source, recipe, 0, stop)?;
            return Ok(done.map(|done| done.map(|done| (done.metrics, done.loading))));
        };
        let (mut towers, classes) = (self.engine.towers()?, &self.dataset.classes);
        if classes.len() < 2 {
            return Ok(retrieval(towers.as_mut(), source, recipe, tokenizer.clone(), stop));
        }
        let texts = TextSettings::new(recipe, packing::slots(recipe), tokenizer.clone());
        let mut model = ZeroShot::new(towers, recipe, texts, classes, &recipe.text.prompts)?;
        let done = evaluate_on(&self.ranks, &mut model, source, recipe, 0, stop)?;
        Ok(done.map(|done| done.map(|done| (done.metrics, done.loading))))
    }
}
