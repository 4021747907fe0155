//! When the units of a recorded step are gathered, let go and summed.

use super::units::Units;
use crate::autograd::graph::Kind;
use crate::autograd::{Graph, Plan};

/// A span of nodes in which a unit's weights are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The unit.
    pub unit: usize,
    /// Place in the plan's order of the first node that uses it.
    pub first: usize,
    /// And of the last.
    pub last: usize,
}

/// A span of nodes that add to the gradients of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Place in the plan's order of the first.
    pub first: usize,
    /// And of the last.
    pub last: usize,
}

/// Something that is done before or after a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin to gather the weights of this visit.
    Post(usize),
    /// They are needed from here on.
    Await(usize),
    /// They are not needed until another visit.
    Release(usize),
    /// Gradients of this unit are added to from here on.
    Clear(usize),
    /// The gradients of this unit are whole: begin to sum them.
    Reduce(usize),
}

/// What is done before and after each node of a plan.
///
/// A unit is visited once forward and once backward, but for the last ones, between whose uses nothing else is
/// gathered. Gathering visit i + 1 begins with visit i.
#[derive(Clone, Debug)]
pub struct Schedule {
    visits: Vec<Visit>,
    gradients: Vec<Option<Span>>,
    before: Vec<Vec<Action>>,
    after: Vec<Vec<Action>>,
}

impl Schedule {
    /// The schedule of a planned step.
    pub fn new(graph: &Graph, plan: &Plan, units: &Units) -> Self {
        let mut unit_of = vec![0; graph.params().len()];
        for (u, unit) in units.units().iter().enumerate() {
            unit_of[unit.params.clone()].fill(u);
        }
        let mut visits: Vec<Visit> = Vec::new();
        let mut gradients: Vec<Option<Span>> = vec![None; units.units().len()];
        for (at, &index) in plan.order.iter().enumerate() {
            let node = &graph.nodes()[index];
            for tensor in node.inputs.iter().chain(&node.outputs).flatten() {
                match graph.info(*tensor).kind {
                    Kind::Parameter(p) => visit(&mut visits, unit_of[p], at),
                    Kind::Gradient(p) => {
                        gradients[unit_of[p]].get_or_insert(Span { first: at, last: at }).last = at;
                    }
                    _ => {}
                }
            }
        }
        let (mut before, mut after) =
            (vec![Vec::new(); plan.order.len()], vec![Vec::new(); plan.order.len()]);
        for (i, visit) in visits.iter().enumerate() {
            if i == 0 {
                before[visit.first].push(Action::Post(0));
            }
            before[visit.first].push(Action::Await(i));
            if i + 1 < visits.len() {
                before[visit.first].push(Action::Post(i + 1));
            }
            after[visit.last].push(Action::Release(i));
        }
        for (unit, span) in gradients.iter().enumerate() {
            if let Some(Span { first, last }) = span {
                before[*first].push(Action::Clear(unit));
                after[*last].push(Action::Reduce(unit));
            }
        }
        Self { visits, gradients, before, after }
    }

    /// The visits in order.
    pub fn visits(&self) -> &[Visit] {
        &self.visits
    }

    /// When each unit's gradients are added to; none where it has none.
    pub fn gradients(&self) -> &[Option<Span>] {
        &self.gradients
    }

    /// What is done before node `at` of the order.
    pub fn before(&self, at: usize) -> &[Action] {
        &self.before[at]
    }

    /// What is done after it.
    pub fn after(&self, at: usize) -> &[Action] {
        &self.after[at]
    }

    /// Elements that a rank sends in one run: its piece of every unit to all others for each visit, and theirs of
    /// the gradients of every unit that has any. Rank `rank` is that of `units`.
    pub fn volume(&self, units: &Units) -> u64 {
        let others = (units.rank().size - 1) as u64;
        let own = |unit: usize, rank: usize| -> u64 {
            units.slices_of(unit, rank).iter().map(|slice| slice.range.len() as u64).sum()
        };
        let gathered: u64 = self.visits.iter().map(|visit| others * own(visit.unit, units.rank().rank)).sum();
        let reduced = self.after.iter().flatten().filter_map(|action| match action {
            Action::Reduce(unit) => Some(units.units()[*unit].len as u64 - own(*unit, units.rank().rank)),
            _ => None,
        });
        gathered + reduced.sum::<u64>()
    }
}

/// Adds a use. It belongs to the unit's newest visit where at most one other unit was visited since.
fn visit(visits: &mut Vec<Visit>, unit: usize, at: usize) {
    let newest = visits.iter().rposition(|visit| visit.unit == unit);
    match newest {
        Some(i) if visits.len() - i <= 2 => visits[i].last = at,
        _ => visits.push(Visit { unit, first: at, last: at }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::graph::{Extent, Init};
    use crate::autograd::{ParamSpec, Shard, gemm};

    /// A stem, three blocks and a head, each a matrix.
    fn recorded() -> (Graph, Plan) {
        let mut graph = Graph::new();
        let mut x = graph.input("x", 4, 8, Extent::Fixed);
        for name in ["stem", "blocks.0.w", "blocks.1.w", "blocks.2.w", "head"] {
            let (name, init) = (name.into(), Init::Constant(0.0));
            let w = graph.param(ParamSpec { name, shape: vec![8, 8], init, decay: true, head: false });
            x = gemm::linear(&mut graph, x, w, None);
        }
        let dx = graph.input("dx", 4, 8, Extent::Fixed);
        graph.backward(&[(x, dx)]);
        let plan = Plan::new(&graph);
        (graph, plan)
    }

    #[test]
    fn units_come_one_ahead_and_the_last_ones_stay() {
        let (graph, plan) = recorded();
        let units = Units::new(&graph, Shard { rank: 0, size: 2 });
        let schedule = Schedule::new(&graph, &plan, &units);
        let visited: Vec<usize> = schedule.visits().iter().map(|visit| visit.unit).collect();
        // The last block and the head are there from their forward pass to their backward pass.
        assert_eq!(visited, [0, 1, 2, 3, 4, 2, 1]);
        let (mut posted, mut awaited, mut released) = (0, 0, 0);
        for at in 0..plan.order.len() {
            for action in schedule.before(at).iter().chain(schedule.after(at)) {
                match *action {
                    Action::Post(visit) => {
                        assert_eq!(visit, posted);
                        posted += 1;
                    }
                    Action::Await(visit) => {
                        assert!(visit == awaited && visit < posted);
                        awaited += 1;
                    }
                    Action::Release(_) => released += 1,
                    Action::Clear(_) | Action::Reduce(_) => {}
                }
            }
            assert!(posted <= awaited + 1, "at most one is on its way");
        }
        assert_eq!([posted, awaited, released], [7; 3]);
    }

    #[test]
    fn gradients_are_cleared_before_and_summed_behind() {
        let (graph, plan) = recorded();
        let units = Units::new(&graph, Shard { rank: 0, size: 2 });
        let schedule = Schedule::new(&graph, &plan, &units);
        for (unit, span) in schedule.gradients().iter().enumerate() {
            let span = span.unwrap();
            assert!(schedule.before(span.first).contains(&Action::Clear(unit)));
            assert!(schedule.after(span.last).contains(&Action::Reduce(unit)));
        }
        // Seven gathers of half a matrix, and half of the gradients of five.
        assert_eq!(schedule.volume(&units), 7 * 32 + 5 * 32);
    }
}
