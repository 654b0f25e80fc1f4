package gemmamtp.demo

import gemmamtp.core.InputError
import gemmamtp.core.firstChangedFile
import gemmamtp.core.readManifest
import java.io.File
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class BundlesTest {
    private val installed = newFolder()
    private val pushed = newFolder()
    private val devices = newFolder()
    private val bundles = Bundles(installed, listOf(pushed, File("/nowhere")), devices)

    private fun refused(source: BundleSource): String {
        val before = content()
        val line = assertFailsWith<InputError> { bundles.install(source) {} }.message.orEmpty()
        assertEquals(before, content(), "what fails changes nothing")
        assertEquals(1, line.lines().size)
        return line
    }

    private fun content() = installed.walk().filter { it.isFile }.associate { it.path to it.readText() }

    @Test
    fun copiesEveryFileAndReportsBytes() {
        val files = tinyBundle()
        val works = ArrayList<Work>()
        val bundle = bundles.install(FakeSource("toy", files)) { works.add(it) }
        assertEquals(BundleFolder(File(installed, "toy")), bundle)
        val copied = bundle.dir.listFiles().orEmpty().associate { it.name to it.readText() }
        assertEquals(files.mapValues { String(it.value) }, copied)
        val total = files.values.sumOf { it.size }.toLong()
        assertEquals(Work(Step.COPYING, total, total), works.last { it.step == Step.COPYING })
        val checked = total - files.getValue("manifest.json").size
        assertEquals(Work(Step.CHECKING, checked, checked), works.last())
    }

    @Test
    fun whatWasCheckedWhileInstallingIsNotReadAgain() {
        val toy = bundles.install(FakeSource("toy", tinyBundle())) {}
        val manifest = readManifest(toy.dir)
        val device = deviceFolder(devices, manifest)
        // Files of a real bundle are large, and were written seconds before they are checked.
        firstChangedFile(toy.dir, manifest, device, settled = -1_000_000_000)
        val moved = File(installed, "moved").also { toy.dir.renameTo(it) }
        val works = ArrayList<Work>()
        val opener = BundleOpener({ _, _, _ -> throw InputError("loading is not what is tested") }, devices)
        assertFailsWith<InputError> { opener.open(moved) { works.add(it) } }
        assertEquals(2, works.count { it.step == Step.CHECKING }) // one for each file, not for each block of it
    }

    @Test
    fun theSameManifestIsNotCopiedAgainAndAnotherReplaces() {
        bundles.install(FakeSource("toy", tinyBundle())) {}
        val again = FakeSource("toy", tinyBundle())
        bundles.install(again) {}
        assertEquals(listOf("manifest.json"), again.opened)
        bundles.install(FakeSource("toy", tinyBundle("o".repeat(128)))) {}
        assertEquals("o".repeat(128), File(installed, "toy/model.pte").readText())
        assertEquals(listOf("toy"), installed.list().orEmpty().toList())
    }

    @Test
    fun whatBreaksOffHalfWayLeavesNothing() {
        bundles.install(FakeSource("toy", tinyBundle())) {}
        val new = tinyBundle("n".repeat(128))
        assertTrue("the cable is out" in refused(FakeSource("toy", new, failing = "per_layer.table")))
        assertTrue("the cable is out" in refused(FakeSource("other", new, failing = "per_layer.table")))
    }

    @Test
    fun aDamagedOrIncompleteCopyIsRefused() {
        val damaged = tinyBundle() + ("model.pte" to "v".repeat(128).toByteArray())
        assertTrue("model.pte: not as manifest.json says" in refused(FakeSource("toy", damaged)))
        val absent = tinyBundle() - "per_layer.table"
        assertTrue("per_layer.table" in refused(FakeSource("toy", absent)))
        val none = tinyBundle() - "manifest.json"
        assertTrue("manifest.json is missing" in refused(FakeSource("toy", none)))
    }

    @Test
    fun namesCannotLeadElsewhere() {
        for (name in listOf("", ".", "..", ".hidden", "a/b", "../a")) {
            assertTrue("not a name" in refused(FakeSource(name, tinyBundle())), name)
            assertTrue("not a name" in refused(FakeSource("toy", tinyBundle() + (name to ByteArray(1)))), name)
        }
    }

    @Test
    fun moreThanFitsIsRefusedBeforeCopying() {
        val toy = FakeSource("toy", tinyBundle())
        val huge = object : BundleSource by toy {
            override fun files() = toy.files() + SourceFile("x", Long.MAX_VALUE / 2) { error("") }
        }
        assertTrue("storage are free" in refused(huge))
    }

    @Test
    fun leftoversOfAKilledProcessAreNoBundlesAndGo() {
        put(File(installed, ".new-toy"), tinyBundle())
        assertEquals(emptyList(), bundles.list())
        Bundles(installed, emptyList(), devices)
        assertEquals(emptyList(), installed.list().orEmpty().toList())
    }

    @Test
    fun whatWasBeingReplacedComesBack() {
        put(File(installed, ".old-toy"), tinyBundle())
        put(File(installed, ".new-toy"), tinyBundle())
        put(File(installed, ".old-done"), tinyBundle())
        put(File(installed, "done"), tinyBundle("n".repeat(128)))
        Bundles(installed, emptyList(), devices)
        assertEquals(listOf("done", "toy"), installed.list().orEmpty().sorted())
        assertEquals("n".repeat(128), File(installed, "done/model.pte").readText())
    }

    @Test
    fun listsWhatIsInstalledAndWhatWasPushed() {
        put(File(installed, "b"), tinyBundle())
        put(File(pushed, "a"), tinyBundle())
        put(File(pushed, "no-manifest"), tinyBundle() - "manifest.json")
        assertEquals(listOf("b", "a"), bundles.list().map { it.name })
        put(pushed, tinyBundle())
        assertEquals(listOf("b", pushed.name, "a"), bundles.list().map { it.name })
    }

    @Test
    fun memoryIsWeightsAndTwoFullCachesWithoutTheMappedTable() {
        put(pushed, tinyBundle())
        val opener = BundleOpener({ _, _, _ -> error("nothing is loaded") }, newFolder())
        val needed = opener.memoryNeeded(pushed)
        assertEquals(128 + 2 * 4L * 2 * 3 * (500 + 256), needed)
    }

    @Test
    fun missingNativeLibrariesAreOneLine() {
        put(pushed, tinyBundle())
        val opener = BundleOpener({ _, _, _ -> throw UnsatisfiedLinkError("no libexecutorch.so") }, newFolder())
        val line = assertFailsWith<InputError> { opener.open(pushed) {} }.message.orEmpty()
        assertTrue("no executorch libraries for this device (no libexecutorch.so)" in line, line)
    }
}
