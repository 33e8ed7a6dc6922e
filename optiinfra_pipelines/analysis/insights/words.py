"""The plain words that a written insight may use; every other word must come from the evidence it cites.

Why a closed list: a name that nobody knows ("bravo") cannot be told from an ordinary word by its form, so the only
check that finds every invented name is one that knows every word that is none. Left out on purpose: words of
counting other than numbers ("twice", "half", "both"), of dates ("yesterday"), of all-clear ("healthy", "normal",
"safe") and of authority ("approved"), which no evidence can carry. Endings (-s, -ed, -ing, -ly) are `is_plain`'s.
"""

from __future__ import annotations

_GRAMMAR = """
a about above across after again against ago all almost along already also although always am among an and another any
are around as at away back based be because become before behind below beneath beside besides between beyond but by
can cannot could current despite did do does down due during each either else enough especially even ever every
everything except few fewer first for from further had has have having he hence here how however i if in indeed inside
instead into is it its itself just last later latest latter least less lest let likely little many may maybe me mean
means meanwhile might more moreover most mostly much must near nearly neither never nevertheless next no nor not nothing
now of off often on only onto or other others otherwise our out outside over overall own part particular per perhaps
please possible possibly probable probably quite rather really regarding same several shall she should similar since so
some somewhat soon still such than that the their them themselves then there thereby therefore these they this those
though through throughout thus to together too toward towards under unless until unlike up upon us usual very via was
way we were what whatever when whenever where whereas whereby wherever whether which whichever while who whole
whom whose why will with within without would yet you your
"""

_VERBS = """
absorb accept accompany account accumulate achieve act activate actively add address adjust admit affect aggravate aim
alert align alleviate allocate allow amount analyze answer appear apply approach arise arrive ask assign assume attain
attribute avoid await balance bear begin began begun belong bind bound block bottleneck break bring brought broke
broken build built burn buy cache call came capture carry cast catch caught cause change charge check choose cite claim
clear climb close collect combine come compare compete complete compute concern conclude confirm consider consist
consolidate consume contain contend continue contribute control correlate cost count cover create cross cut deal
decide decline decode decrease defer degrade delay deliver demand depend deplete deploy describe detect deteriorate
determine develop differ diminish direct disappear dispatch display distribute divert do dominate done drain draw drawn
drive driven drop ease eliminate emit enable encounter end ensure enter evict examine exceed execute exhaust exhibit
exist expand expect experience expire explain expose extend face fail fall fallen fell fetch fill find finish fit fix
flag flap flow fluctuate follow force found free gain gave generate get give given go goes gone got grew group grow
grown guide handle happen hamper harm held help hide hinder hit hold hurt idle identify ignore impact impair imply
improve include increase indicate induce inform inspect insert intend interfere interpret interrupt investigate involve
isolate issue join keep kept kick know known lack lag land launch lead leave led left lengthen lie lift limit link list
load locate log look lose lost low lower made maintain make manage map mark match matter measure meet merge met miss
mitigate modify monitor mount move narrow need note notice observe occupy occur offer offload open operate originate
oversubscribe paint pass pause pay peak perform persist pick pin place plan plateau point pose position postpone pin
preempt prefer prefill present prevent price proceed process produce prolong propose protect prove provide pull push
put queue quantize raise ran reach react read reappear rebalance receive recheck recompute recommend record recover
recur redistribute reduce refer reflect refresh refuse regain regard reject relate release relieve rely remain remedy
remove repeat replace report represent request require reserve reset resolve respond restart restore restrict result
resume retain retract retry return reuse reveal review revert rise risen roll rose route run sample saturate save saw
say scale schedule scrape see seek seem seen select send sent separate serve set settle shape share shed shift shorten
show shown shrink shrunk signal size skew slow smooth solve spare spend spent spike split spread stabilize stagger stall
stand start starve state stay stem step stop store strain stress stretch struggle suffer suggest suit supply support
surge surpass suspect sustain swap switch take taken target tell tend test throttle tie tighten took touch track
transfer translate treat trend trigger trim try tune turn underlie understand undo unload unlock update use utilize
validate vary verify view violate wait warm warn warrant waste watch weigh went widen withdraw work worsen write yield
"""

_THINGS = """
ability absence abstention accelerator acceptance access accuracy action activity actuality addition adjustment
admission advice aim amount answer api area arrival aspect attempt attention attainment availability average backend
backlog backpressure balance band bandwidth baseline basis batch behavior benefit bin bit board body boost bottleneck
bottom boundary bucket budget buffer buildup burden burst byte cadence caller candidate cap capability capacity card
case category cell chain chance chart chip chunk circumstance claim class client clock cluster code cold collection
combination comparison completion component composition compression computation concern concurrency condition config
configuration conflict congestion connection consequence consistency constraint consumer consumption contention context
contract contrast contribution controller cooling core correction correlation cost cooldown crash credit criterion
customer cycle damage dashboard data day deadline decision decoder default deficit definition degradation delivery
density dependency deployment depth description destination detail deterioration device diagnosis difference difficulty
dimension direction discrepancy disk distribution disturbance document driver drift duration duty edge effect
efficiency effort element elsewhere endpoint energy engine entry environment episode error estimate evaluation event
eviction evidence exception excess execution expectation expense experiment explanation exporter exposure extent factor
failure fan fault feature figure file finding fleet flow form fraction fragmentation frame frequency frontend fuel
function gap gate gateway goal goodput gradient growth guess hand handler hardware head headroom heat height history
hit hop host hour hypothesis idea idleness imbalance impact improvement incident increment indication indicator
inefficiency inference information input instability installation instance instruction interference interruption
interval item job kernel key kind knob lane latency layer layout length level library lifetime limitation line list
locality location machine maintenance majority management manner margin maximum mean measure measurement mechanism
median member memory message method metric middle minimum minority minute mismatch mitigation mix mode model moment
mixture month movement name nature need network node noise norm note number objective observation occupancy occurrence
offset onset operation operator optimum option order origin outage outcome output overhead overload owner pace packet
page panel parallelism parameter part partition path pattern payload peer penalty percent percentile performance period
phase picture piece pipeline placement platform policy pool popularity port portion possibility potential power
preemption prefix presence pressure prevalence priority probability probe problem procedure processor profile program
progress promise prompt property proportion proposal provider proxy purpose quality quantile quantity quantization
question rank rate ratio reading reason recommendation recovery reduction region regression rejection relation
relationship release reliability remainder remedy replica replication reply resource response responsiveness rest
restriction retention retraction retrieval reuse rise risk role rollout root round router routine row rule runner
runtime saturation saving scale scenario schedule scheduler scope scraper second section segment sensor sequence series
server service session setting severity share shortage shortfall side sign signal situation slice slope slot slowdown
snapshot software source space span speed spike stability stage stall startup starvation stat statement statistic
status step storage store stream strength stretch subject subset success sum summary support surface swap symptom
system table tail task team telemetry temperature tendency term test thing threshold throughput tick tier time timeout
timing token tool top total traffic transition trend trouble truth type uncertainty understanding unit uptime usage
user utilization value variability variance variation vendor verification version vicinity view violation visibility
volume voltage wait warmup weight width window word worker workload world year zone
"""

_QUALITIES = """
abnormal abrupt absent accurate active actual acute additional adequate adverse aggressive alone alternative apparent
applicable appropriate approximate asynchronous attached attainable available bad better best big brief broad busy
careful causal central certain cheap clear clean close coherent common comparable complete complex concurrent
conditional confident considerable consistent constant continuous contrary conservative correct corresponding critical
crowded cumulative deep deeper definite dense detailed different difficult direct distinct dominant early earlier easy
effective efficient elevated empty entire equal essential evident exact excess excessive existing expected expensive
explicit external extra extreme faint fair familiar far fast faster few final finite fixed flat fresh frequent full
fuller general genuine global good gradual great greater growing hard heavy heavier hidden high higher highest hot huge
identical immediate important inactive inadequate incomplete inconclusive inconsistent incorrect independent indirect
individual inefficient initial insufficient intense intensive intermittent internal irregular isolated joint key large
larger largest late lasting light lighter linear local logical long longer longest loose low lower lowest main major
manual marginal massive material maximal meaningful mild minimal minor missing mixed moderate modest momentary narrow
native natural necessary negative negligible new newer noisy notable numerous obvious occasional old older online open
operational opposite optimal ordinary original outdated overloaded partial past peculiar periodic permanent persistent
physical plausible poor positive potent potential preceding precise preliminary present previous primary prior prolonged
prominent prompt proper proportional pronounced quick quiet random rapid rare raw ready real realistic reasonable recent
recurring redundant related relative relevant reliable remaining remote repeated representative responsible responsive
right rough roughly rising saturated scarce secondary sensible sensitive separate serious severe sharp short shorter
sizable slight slow slower small smaller smallest sole solid specific spiky stable stale standard static steady steep
strong stronger structural subsequent substantial successful sudden sufficient suitable superfluous sure surplus
surprising sustained synchronous temporary thermal thin tight tiny total transient typical unable unavailable uncertain
unchanged unclear underused uneven unexpected unhealthy unknown unlikely unnecessary unresolved unstable unusual unused
upcoming upper urgent useful useless vague valid visible warm weak wide wider widespread worse worst wrong
accordingly altogether anyway apart aside chiefly consequently currently effectively entirely eventually exactly finally
formerly fully further furthermore generally hardly highly immediately initially largely lately locally mainly merely
namely namely nonetheless notably originally partly precisely presently presumably previously primarily purely quickly
readily recently repeatedly seemingly severely sharply shortly significantly significant simply simultaneously slightly
slowly solely specifically strictly strongly subsequently substantially suddenly temporarily typically ultimately
unusually usually visibly
"""

# Short forms of the trade; the ones that carry a digit ("p95", "FP8") count as names and must be in the evidence.
_SHORT = """
api cpu ecc gpu gpus http io itl kv llm mig nvlink nvml oom pcie psi sla slo sm sre tokenizer tp tpot ttft utc xid vs
"""

WORDS: frozenset[str] = frozenset(" ".join((_GRAMMAR, _VERBS, _THINGS, _QUALITIES, _SHORT)).split())


def is_plain(word: str) -> bool:
    """Whether a word, in any case and with an ordinary English ending, is on the list."""
    lower = word.lower().removesuffix("'s").removesuffix("'")
    return lower in WORDS or any(stem in WORDS for stem in _stems(lower))


def _stems(word: str) -> list[str]:
    """What a word may be an inflection of: queues, queued, queueing, stopped, bursty is none."""
    stems: list[str] = []
    if word.endswith(("ies", "ied")):
        stems.append(word[:-3] + "y")
    if word.endswith(("es", "ed")):
        stems += [word[:-2], word[:-1]]
    elif word.endswith("s") and not word.endswith("ss"):
        stems.append(word[:-1])
    if word.endswith("ing"):
        stems += [word[:-3], word[:-3] + "e"]
    if word.endswith("ly"):
        stems += [word[:-2], word[:-2] + "le", word[:-3] + "y"]
    undoubled = [stem[:-1] for stem in stems if len(stem) > 3 and stem[-1] == stem[-2]]
    return [stem for stem in stems + undoubled if len(stem) > 1]
