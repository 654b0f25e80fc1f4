package gemmamtp.demo

import gemmamtp.core.InputError
import java.io.File
import java.io.IOException
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class BundlesTest {
    private val installed = newFolder()
    private val pushed = newFolder()
    private val bundles = Bundles(installed, listOf(pushed, File("/nowhere")))

    private fun refused(source: BundleSource): String {
        val before = bundles.list().map { it.dir.walk().filter(File::isFile).map { file -> file.path to file.readText() }.toList() }
        val line = assertFailsWith<InputError> { bundles.install(source) {} }.message.orEmpty()
        assertEquals(before, bundles.list().map { it.dir.walk().filter(File::isFile).map { file -> file.path to file.readText() }.toList() })
        assertEquals(1, line.lines().size)
        return line
    }

    @Test
    fun copiesEveryFileAndReportsBytes() {
        val files = tinyBundle()
        val works = ArrayList<Work>()
        val bundle = bundles.install(FakeSource("toy", files)) { works.add(it) }
        assertEquals(BundleFolder(File(installed, "toy")), bundle)
        val copied = bundle.dir.listFiles().orEmpty().associate { it.name to it.readText() }
        assertEquals(files.mapValues { String(it.value) }, copied)
        val total = (files - "manifest.json").values.sumOf { it.size }.toLong()
        assertEquals(Work(Step.COPYING, total, total), works.last())
    }

    @Test
    fun theSameManifestIsNotCopiedAgainAndAnotherReplaces() {
        bundles.install(FakeSource("toy", tinyBundle())) {}
        val again = FakeSource("toy", tinyBundle())
        bundles.install(again) {}
        assertEquals(listOf("manifest.json"), again.opened)
        bundles.install(FakeSource("toy", tinyBundle("o".repeat(128)))) {}
        assertEquals("o".repeat(128), File(installed, "toy/model.pte").readText())
        assertEquals(listOf("toy"), bundles.list().map { it.name })
    }

    @Test
    fun whatBreaksOffGoesOnUnlessAnotherComes() {
        bundles.install(FakeSource("toy", tinyBundle())) {}
        val new = tinyBundle("n".repeat(128))
        assertTrue("the cable is out" in refused(FakeSource("toy", new, failing = "model.pte")))
        val again = FakeSource("toy", new)
        bundles.install(again) {}
        assertEquals(listOf("manifest.json", "model.pte"), again.opened.distinct())
        assertTrue("the cable is out" in refused(FakeSource("other", new, failing = "per_layer.table")))
        assertEquals(listOf("toy"), bundles.list().map { it.name })
        bundles.install(FakeSource("third", new)) {}
        assertEquals(emptyList(), installed.list().orEmpty().filter { it.endsWith(".download") })
    }

    @Test
    fun whatIsNotWholeOrHasNoNameIsRefused() {
        assertTrue("manifest.json: is missing" in refused(FakeSource("toy", tinyBundle() - "manifest.json")))
        assertTrue("model.pte: is missing" in refused(FakeSource("toy", tinyBundle() - "model.pte")))
        assertTrue("has the sha256" in refused(FakeSource("toy", tinyBundle() + ("model.pte" to "x".repeat(128).toByteArray()))))
        for (name in listOf("", ".", "..", ".hidden", "a/b", "../a", "x.download")) {
            assertTrue("not a name" in refused(FakeSource(name, tinyBundle())), name)
        }
        val nameless = object : BundleSource by FakeSource("toy", tinyBundle()) {
            override val name: String get() = throw IOException("the folder has no name")
        }
        assertTrue("the folder has no name" in refused(nameless))
    }

    @Test
    fun aDownloadIsNamedAsItsFolderAndOpenedOnTrial() {
        val line = assertFailsWith<InputError> { bundles.download(" http://127.0.0.1:1/a/.. ", "0".repeat(64), {}, {}) }.message
        assertTrue("'..': not a name" in line.orEmpty(), line)
        for (url in listOf("https://x/toy?a", "toy")) {
            val error = assertFailsWith<InputError> { bundles.download(url, "0".repeat(64), {}, {}) }.message
            assertTrue("not the address of a folder" in error.orEmpty(), error)
        }
    }

    @Test
    fun whatWasBeingReplacedComesBack() {
        put(File(installed, ".old-toy"), tinyBundle())
        put(File(installed, "toy.download"), tinyBundle())
        put(File(installed, ".old-done"), tinyBundle())
        put(File(installed, "done"), tinyBundle("n".repeat(128)))
        assertEquals(listOf("done", "toy"), bundles.list().map { it.name })
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
