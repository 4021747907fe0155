//! What goes on while a launch runs.

use super::CopyPolicy;
use super::schedule::Order;

/// Copies and writes of streams other than that of a launch, in streams that do one after the other.
pub trait Beside {
    /// Whether nothing is left to do.
    fn is_idle(&self) -> bool;

    /// Does the next of one stream, the `draw`th or one that follows it; false where none can go on.
    fn step(&mut self, draw: usize) -> bool;

    /// What the streams wait for, for the report of a deadlock.
    fn waits(&self) -> String;
}

/// Nothing goes on.
pub struct Nothing;

impl Beside for Nothing {
    fn is_idle(&self) -> bool {
        true
    }

    fn step(&mut self, _: usize) -> bool {
        false
    }

    fn waits(&self) -> String {
        String::new()
    }
}

/// In how many steps of warps one operation happens at random.
const RARELY: usize = 8;

/// Lets it go on as a policy says.
pub(super) struct Pace<'a> {
    beside: &'a mut dyn Beside,
    policy: CopyPolicy,
    order: Order,
    idle: bool,
    /// Whether anything happened since it was last asked.
    happened: bool,
}

impl<'a> Pace<'a> {
    pub fn new(beside: &'a mut dyn Beside, policy: CopyPolicy, seed: u64) -> Self {
        let idle = beside.is_idle();
        // Of other draws than the threads' own.
        Self { beside, policy, order: Order::new(!seed), idle, happened: false }
    }

    fn step(&mut self) -> bool {
        let draw = self.order.below(usize::MAX);
        let stepped = self.beside.step(draw);
        self.happened |= stepped;
        stepped
    }

    /// Between two steps of a warp.
    pub fn between(&mut self) {
        if self.idle {
            return;
        }
        match self.policy {
            CopyPolicy::AtIssue => {
                while self.step() {}
                self.idle = self.beside.is_idle();
            }
            CopyPolicy::Random if self.order.below(RARELY) == 0 => {
                self.step();
            }
            CopyPolicy::Random | CopyPolicy::AtWait => {}
        }
    }

    /// Where no thread gets on without it; whether it did.
    pub fn at_last(&mut self) -> bool {
        !self.idle && self.step()
    }

    /// Whether anything happened since the last call.
    pub fn happened(&mut self) -> bool {
        std::mem::take(&mut self.happened)
    }

    /// What else there is to say of a deadlock.
    pub fn waits(&self) -> String {
        self.beside.waits()
    }
}
