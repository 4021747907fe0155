//! The ranks that a training runs on: one, threads of this process, or processes that a launcher started.

use std::rc::Rc;
use std::time::Duration;

use crate::device::{self, DeviceChoice, Selected};
use crate::error::{Error, Result};
use crate::parallel::launch::Launch;
use crate::parallel::tcp::{Identity, Timeouts, connect};
use crate::parallel::{DEFAULT_TIMEOUT, Group, Mesh, MeshGroups, Ranks};

/// Options about ranks.
#[derive(Debug, clap::Args)]
pub(super) struct RankArgs {
    /// Train on N ranks, threads of this process, each on a GPU of its own or all on one. Processes that torchrun, srun or mpirun starts are ranks by
    /// themselves.
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Ranks that share the layers for a batch; must divide the number of ranks.
    #[arg(long, value_name = "K", default_value_t = 1)]
    tensor: usize,
    /// A rank that is silent for so long ends all others.
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_TIMEOUT.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
}

/// Where the ranks of this process are.
enum World {
    Here(usize),
    Launched(Launch),
}

impl RankArgs {
    fn world(&self) -> Result<World> {
        match (Launch::from_env()?, self.ranks) {
            (None, ranks) => Ok(World::Here(ranks.unwrap_or(1))),
            (Some(launch), None) => Ok(World::Launched(launch)),
            (Some(Launch { rank, world, .. }), Some(_)) => Err(Error::usage(format!(
                "--ranks starts ranks in this process, which its launcher has made rank {rank} of {world} already; leave \
                 --ranks out, or start it without a launcher"
            ))),
        }
    }

    /// The mesh, and whether this process has its first rank. Starts nothing.
    pub fn mesh(&self) -> Result<(Mesh, bool)> {
        let (size, first) = match self.world()? {
            World::Here(size) => (size, true),
            World::Launched(launch) => (launch.world, launch.rank == 0),
        };
        Ok((Mesh::new(size, self.tensor)?, first))
    }

    /// The device of the first rank of this process, and how many ranks share it.
    ///
    /// # Errors
    /// Those of [`device::select`], and too few GPUs.
    pub fn first_device(&self, choice: DeviceChoice) -> Result<(Selected, usize)> {
        match self.world()? {
            World::Here(size) => {
                let devices = device::select_for_ranks(choice, size.max(1))?;
                let shared = sharing(&devices);
                devices.into_iter().next().map(|first| (first, shared)).ok_or_else(|| Error::usage("0 ranks"))
            }
            World::Launched(launch) => Ok((device::select_for_rank(choice, launch.local_rank)?, 1)),
        }
    }

    /// Runs `f` on the ranks of this process, each with its device, or with why it has none, and the number of ranks
    /// that share it.
    ///
    /// # Errors
    /// Ranks that do not come or are no mesh; those of `f`.
    pub fn run(
        &self,
        choice: DeviceChoice,
        f: impl Fn(Rc<MeshGroups>, Result<Selected>, usize) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        let (tensor, timeout) = (self.tensor, Duration::from_secs(self.timeout));
        match self.world()? {
            World::Here(1) if tensor == 1 => f(Rc::new(MeshGroups::alone()), device::select(choice), 1),
            World::Here(size) => {
                let mesh = Mesh::new(size, tensor)?;
                let devices = device::select_for_ranks(choice, size)?;
                let shared = sharing(&devices);
                let run = move |world: &Group| {
                    let own = devices[world.rank()].clone();
                    f(Rc::new(MeshGroups::new(world, mesh)?), Ok(own), shared)
                };
                Ranks::new(size).timeout(timeout).run(run).map(drop)
            }
            World::Launched(launch) => {
                // Recipes are compared later, key by key: where one cannot be read, the others are to be told.
                let timeouts = Timeouts { gather: timeout, silence: timeout };
                let world = connect(&launch, &Identity::new(""), timeouts)?;
                world.run(|world| {
                    world.check_same("lengths of the tensor axis", &tensor.to_string())?;
                    match Mesh::new(world.size(), tensor) {
                        Ok(mesh) => {
                            let own = device::select_for_rank(choice, launch.local_rank);
                            f(Rc::new(MeshGroups::new(world, mesh)?), own, 1)
                        }
                        none => world.agree(none.map(drop)),
                    }
                })
            }
        }
    }
}

/// How many ranks share the first of these devices.
fn sharing(devices: &[Selected]) -> usize {
    let first = devices.first().and_then(|first| first.device.as_ref());
    let shares = |selected: &&Selected| match (&selected.device, first) {
        (Some(device), Some(first)) => device.is(first),
        _ => false,
    };
    devices.iter().filter(shares).count().max(1)
}
