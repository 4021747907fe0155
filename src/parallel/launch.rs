//! Which rank this process is, as `torchrun`, `mpirun` and `srun` tell it in the environment.

use crate::error::{Error, Result};

/// Port of the rendezvous where nothing says another: that of PyTorch.
const DEFAULT_PORT: u16 = 29500;

/// A process's place among those that were launched together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Number of this process.
    pub rank: usize,
    /// Number of processes.
    pub world: usize,
    /// Its number on its machine, which chooses its GPU.
    pub local_rank: usize,
    /// Host at which rank 0 is found.
    pub address: String,
    /// And its port.
    pub port: u16,
}

impl Launch {
    /// From the environment of this process; see [`from_vars`](Self::from_vars).
    ///
    /// # Errors
    /// Those of [`from_vars`](Self::from_vars).
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// From environment variables, the first of these that are set; `None` where none is, which is a process
    /// that was started alone.
    ///
    /// | launcher | rank, world, local rank | where rank 0 is |
    /// |---|---|---|
    /// | `torchrun` | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `MASTER_ADDR`, `MASTER_PORT` |
    /// | `mpirun` of Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | the same; one machine: loopback |
    /// | `mpirun` of MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID` | the same |
    /// | `srun` | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID` | the same; else first of `SLURM_STEP_NODELIST`, a port by `SLURM_JOB_ID` |
    ///
    /// `torchrun`'s agent may listen at `MASTER_PORT` itself (`TORCHELASTIC_USE_AGENT_STORE`); rank 0 then
    /// takes the port after it. A batch script of Slurm has its job's variables, but is no rank: those of a step
    /// tell.
    ///
    /// # Errors
    /// Variables that are missing, no numbers, or contradict one another.
    pub fn from_vars(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let vars = Vars(&get);
        if vars.has("RANK") || vars.has("WORLD_SIZE") {
            return vars.torchrun().map(Some);
        }
        if vars.has("OMPI_COMM_WORLD_RANK") {
            let [rank, world, local] =
                ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"];
            let one_machine = vars.text("OMPI_COMM_WORLD_LOCAL_SIZE") == vars.text(world);
            return vars
                .launched([rank, world, local], one_machine.then(|| "127.0.0.1".into()), None)
                .map(Some);
        }
        // An mpirun may start its own daemons as a step of Slurm: then its ranks are not those of the step.
        let same = |mpi, slurm| !vars.has(mpi) || vars.text(mpi) == vars.text(slurm);
        let of_step = same("PMI_RANK", "SLURM_PROCID") && same("PMI_SIZE", "SLURM_STEP_NUM_TASKS");
        if vars.has("SLURM_STEP_NODELIST") && vars.has("SLURM_PROCID") && of_step {
            let names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"];
            let first = vars.text("SLURM_STEP_NODELIST").and_then(|nodes| first_host(&nodes));
            // So that two jobs on one machine seldom meet; the formula is that of JAX.
            let port = vars.number("SLURM_JOB_ID")?.map(|job| 61440 + (job % 4096) as u16);
            return vars.launched(names, first, port).map(Some);
        }
        if vars.has("PMI_RANK") {
            return vars.launched(["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"], None, None).map(Some);
        }
        Ok(None)
    }
}

/// Named texts.
struct Vars<'a, F>(&'a F);

impl<F: Fn(&str) -> Option<String>> Vars<'_, F> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        self.text(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| Error::usage(format!("{name} is {text:?}, which is no number from 0")))
            })
            .transpose()
    }

    fn needed<T>(&self, name: &str, beside: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::usage(format!("{beside} is set but {name} is not; set both or neither")))
    }

    fn port(&self) -> Result<Option<u16>> {
        self.text("MASTER_PORT")
            .map(|text| {
                text.parse().map_err(|_| Error::usage(format!("MASTER_PORT is {text:?}, which is no port")))
            })
            .transpose()
    }

    fn torchrun(&self) -> Result<Launch> {
        let beside = if self.has("RANK") { "RANK" } else { "WORLD_SIZE" };
        let rank = self.needed("RANK", beside, self.number("RANK")?)?;
        let world = self.needed("WORLD_SIZE", beside, self.number("WORLD_SIZE")?)?;
        let address = self.text("MASTER_ADDR");
        let address =
            if world > 1 { self.needed("MASTER_ADDR", beside, address)? } else { "127.0.0.1".into() };
        let taken = self.text("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
        let port = self.port()?.unwrap_or(DEFAULT_PORT);
        let port = if taken { port.checked_add(1).unwrap_or(port - 1) } else { port };
        let local_rank = self.number("LOCAL_RANK")?.unwrap_or(0);
        checked(Launch { rank, world, local_rank, address, port }, ["RANK", "WORLD_SIZE"])
    }

    /// A launcher with variables of its own, which need not tell where rank 0 is.
    fn launched(
        &self,
        [rank, world, local]: [&'static str; 3],
        first_host: Option<String>,
        port: Option<u16>,
    ) -> Result<Launch> {
        let names = [rank, world];
        let rank = self.needed(rank, world, self.number(rank)?)?;
        let world = self.needed(world, names[0], self.number(world)?)?;
        let alone = (world <= 1).then(|| "127.0.0.1".to_owned());
        let address = self.text("MASTER_ADDR").or(first_host).or(alone).ok_or_else(|| {
            Error::usage(format!(
                "{} does not tell on which machine rank 0 is; set MASTER_ADDR to its name",
                names[0]
            ))
        })?;
        let port = self.port()?.or(port).unwrap_or(DEFAULT_PORT);
        let local_rank = self.number(local)?.unwrap_or(0);
        checked(Launch { rank, world, local_rank, address, port }, names)
    }
}

fn checked(launch: Launch, [rank, world]: [&str; 2]) -> Result<Launch> {
    if launch.rank >= launch.world {
        return Err(Error::usage(format!(
            "{rank} is {} and {world} is {}; ranks are counted from 0",
            launch.rank, launch.world
        )));
    }
    Ok(launch)
}

/// The first host of a list of Slurm, such as `node[03-05,9],login1`.
fn first_host(list: &str) -> Option<String> {
    let (mut host, mut numbers, mut skipping) = (String::new(), false, false);
    for c in list.chars() {
        match c {
            '[' => numbers = true,
            ']' => (numbers, skipping) = (false, false),
            ',' if !numbers => break,
            '-' | ',' if numbers => skipping = true,
            _ if skipping => {}
            c => host.push(c),
        }
    }
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `NAME=value` words.
    fn launch(vars: &str) -> Result<Option<Launch>> {
        Launch::from_vars(|name| {
            let mut words = vars.split_whitespace().filter_map(|word| word.split_once('='));
            words.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
        })
    }

    #[track_caller]
    fn gives(vars: &str, rank: usize, world: usize, local_rank: usize, address: &str, port: u16) {
        let expected = Launch { rank, world, local_rank, address: address.into(), port };
        assert_eq!(launch(vars).unwrap(), Some(expected), "{vars}");
    }

    #[track_caller]
    fn refused(vars: &str, message: &str) {
        assert_eq!(launch(vars).unwrap_err().to_string(), message, "{vars}");
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(launch("HOME=/root MASTER_PORT=1").unwrap(), None);
        let torchrun = "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=node7 MASTER_PORT=4000";
        gives(torchrun, 3, 8, 1, "node7", 4000);
        gives(&format!("{torchrun} TORCHELASTIC_USE_AGENT_STORE=True"), 3, 8, 1, "node7", 4001);
        gives(&format!("{torchrun} TORCHELASTIC_USE_AGENT_STORE=False"), 3, 8, 1, "node7", 4000);
        gives("RANK=0 WORLD_SIZE=1", 0, 1, 0, "127.0.0.1", 29500);

        let mpi = "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=2";
        gives(&format!("{mpi} OMPI_COMM_WORLD_LOCAL_SIZE=4"), 2, 4, 2, "127.0.0.1", 29500);
        gives(&format!("{mpi} OMPI_COMM_WORLD_LOCAL_SIZE=2 MASTER_ADDR=a"), 2, 4, 2, "a", 29500);
        gives("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MASTER_ADDR=a MASTER_PORT=7", 1, 2, 1, "a", 7);

        let step = "SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=8 SLURM_LOCALID=1 SLURM_JOB_ID=4099";
        gives(&format!("{step} SLURM_STEP_NODELIST=gpu[03-04,7]"), 5, 8, 1, "gpu03", 61443);
        gives(&format!("{step} SLURM_STEP_NODELIST=a,b MASTER_ADDR=c MASTER_PORT=9"), 5, 8, 1, "c", 9);
        // What a batch script sees: the job's variables, but no step's.
        assert_eq!(launch("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_JOB_ID=1 SLURM_NODELIST=a").unwrap(), None);
    }

    /// Each inner launcher is asked before the outer one whose variables it has as well.
    #[test]
    fn launchers_within_one_another() {
        let slurm =
            "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_STEP_NODELIST=a SLURM_JOB_ID=0";
        gives(&format!("{slurm} RANK=1 WORLD_SIZE=4 MASTER_ADDR=b MASTER_PORT=5"), 1, 4, 0, "b", 5);
        let mpi = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 MASTER_ADDR=b MASTER_PORT=5";
        gives(&format!("{slurm} {mpi}"), 3, 4, 0, "b", 5);
        gives(&format!("{slurm} PMI_RANK=0 PMI_SIZE=2"), 0, 2, 0, "a", 61440);
        gives(&format!("{slurm} PMI_RANK=5 PMI_SIZE=8 MASTER_ADDR=b"), 5, 8, 0, "b", 29500);
    }

    #[test]
    fn contradictions_are_refused() {
        refused("RANK=1", "RANK is set but WORLD_SIZE is not; set both or neither");
        refused("WORLD_SIZE=2", "WORLD_SIZE is set but RANK is not; set both or neither");
        refused("RANK=0 WORLD_SIZE=2", "RANK is set but MASTER_ADDR is not; set both or neither");
        refused(
            "RANK=2 WORLD_SIZE=2 MASTER_ADDR=a",
            "RANK is 2 and WORLD_SIZE is 2; ranks are counted from 0",
        );
        refused("RANK=x WORLD_SIZE=2", "RANK is \"x\", which is no number from 0");
        refused(
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000",
            "MASTER_PORT is \"70000\", which is no port",
        );
        refused(
            "PMI_RANK=0 PMI_SIZE=2",
            "PMI_RANK does not tell on which machine rank 0 is; set MASTER_ADDR to its name",
        );
    }

    #[test]
    fn first_of_a_list_of_hosts() {
        for (list, first) in [
            ("n1", "n1"),
            ("n1,n2", "n1"),
            ("n[1-4]", "n1"),
            ("n[01,07-09],m", "n01"),
            ("rack-2-n[1-4]x,m", "rack-2-n1x"),
            ("r[1-2]n[3-4]", "r1n3"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        assert_eq!(first_host(""), None);
    }
}
